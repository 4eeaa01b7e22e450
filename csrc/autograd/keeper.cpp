// What the keepers do with a gradient.
#include "keeper.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>

#include "kernel/errors.h"
#include "tap.h"

namespace tlfast {
namespace {

// Add what was seen of a call to the sum of that of earlier calls.
void add_to(at::Tensor& sum, const std::string& who, const at::Tensor& more) {
  if (!sum.defined()) {
    sum = more.to(accumulator(more.scalar_type()), /*non_blocking=*/false, /*copy=*/true);
    return;
  }
  TORCH_CHECK_VALUE(
      sum.sizes() == more.sizes(),  // which add_ would broadcast
      broken_rule(who, "a point", "have one shape in all calls to be summed (" + list_of(sum.sizes()) + ")",
                  list_of(more.sizes()), "Choose calls=\"last\" or \"stack\"."));
  if (on_gpu(more)) read_on(current_stream(more.device()), sum);  // memory of the first call's stream
  sum.add_(more);
}

}  // namespace

ColumnsKeeper::ColumnsKeeper(std::vector<std::shared_ptr<Column>> columns)
    : columns_(std::move(columns)),
      sums_(std::any_of(columns_.begin(), columns_.end(),
                        [](const auto& column) { return column->calls == Calls::sum; })),
      reads_outputs_(
          std::any_of(columns_.begin(), columns_.end(), [](const auto& column) { return column->recipe.reads_act(); })),
      reads_inputs_(std::any_of(columns_.begin(), columns_.end(),
                                [](const auto& column) { return bool(column->recipe.weight); })) {}

std::vector<at::Tensor> ColumnsKeeper::keep_of_input(const std::string& who, const at::Tensor& input,
                                                     Backwards* sharing) const {
  std::vector<at::Tensor> kept;
  for (const auto& column : columns_)
    if (const auto& weight = column->recipe.weight)
      kept.push_back(sharing ? sharing->shared_inputs.keep(who, weight, input, sharing->ledger->n_ended)
                             : weight->keep(who, input));
  return kept;
}

void ColumnsKeeper::gradient(const Call& call, const Seen& all) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Point& point = *call.tap->point;
  const auto [run, block, n_fired] = call.tap->backwards->begin(point, all.grad);
  Pending& held = run->pending[point.index];
  const auto mask = run->mask_on(all.grad.device());
  const Place place = block->place();
  // Both are of the moment before the first column: `held` changes below, and other threads make calls.
  const bool alone = sums_ && call.alone() && !held.adds();
  const bool written = sums_ && n_fired > 1 && !held.adds();  // by a call that was taken for the only one
  bool summed = false;
  size_t n_weights = 0;
  for (size_t number = 0; number < columns_.size(); ++number) {
    Column& column = *columns_[number];
    const Seen seen{.grad = all.grad, .act = column.recipe.weight ? all.kept->at(n_weights++) : all.act};
    const Step step = run->step_at(column, mask);
    if (column.total) {
      held.totals.resize(columns_.size());
      at::Tensor part = column.part(place, seen, step);
      if (column.calls == Calls::sum)
        add_to(held.totals[number], point.who, part);
      else
        held.totals[number] = std::move(part);
      continue;
    }
    switch (column.calls) {
      case Calls::stack:
        held.parts.resize(columns_.size());
        held.parts[number].push_back(column.part(place, seen, step));
        break;
      case Calls::sum:
        if (column.recipe.of == Of::act) {
          TORCH_CHECK_VALUE(n_fired == 1,
                            broken_rule(column.who, "a point", "be called once where activations are to be summed",
                                        "another call", "Choose calls=\"last\" or \"stack\"."));
          column.write(place, seen, step);
          break;
        }
        TORCH_CHECK(!written, broken_rule(point.who, "a point", "fire as often as it was called since the last step",
                                          "once more", "Run one backward for each forward."));
        if (!alone) {
          if (column.recipe.of != Of::weight) column.check(place, seen, step);
          if (column.recipe.adds_rows()) {  // of sums it would be another one
            held.sums.resize(columns_.size());
            add_to(held.sums[number], point.who, column.part(place, seen, step));
          } else if (!std::exchange(summed, true)) {
            add_to(held.sum, point.who, seen.grad);
          }
          break;
        }
        [[fallthrough]];
      case Calls::raise:
      case Calls::last:
        column.write(place, seen, step);
        break;
    }
  }
}

void CacheKeeper::gradient(const Call& call, const Seen& seen) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  cache_->gradient(place_, seen.grad, calls_ == Calls::sum, call.alone());
}

}  // namespace tlfast
