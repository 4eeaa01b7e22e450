// What the keepers do with a gradient.
#include "keeper.h"

#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>

#include "kernel/errors.h"
#include "tap.h"

namespace tlfast {
namespace {

// Add a gradient to the sum of those of earlier calls.
void add_to(Pending& held, const std::string& who, const at::Tensor& grad) {
  if (!held.sum.defined()) {
    held.sum = grad.to(accumulator(grad.scalar_type()), /*non_blocking=*/false, /*copy=*/true);
    return;
  }
  TORCH_CHECK_VALUE(
      held.sum.sizes() == grad.sizes(),  // which add_ would broadcast
      broken_rule(who, "a point", "have one shape in all calls to be summed (" + list_of(held.sum.sizes()) + ")",
                  list_of(grad.sizes()), "Choose calls=\"last\" or \"stack\"."));
  if (on_gpu(grad)) read_on(current_stream(grad.device()), held.sum);  // memory of the first call's stream
  held.sum.add_(grad);
}

}  // namespace

ColumnsKeeper::ColumnsKeeper(std::vector<std::shared_ptr<Column>> columns)
    : columns_(std::move(columns)), sums_(std::any_of(columns_.begin(), columns_.end(), [](const auto& column) {
        return column->calls == Calls::sum;
      })) {}

void ColumnsKeeper::gradient(const Call& call, const at::Tensor& grad) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  const Point& point = *call.tap->point;
  const auto [run, block, n_fired] = call.tap->backwards->begin(point, grad);
  Pending& held = run->pending[point.index];
  const auto mask = run->mask_on(grad.device());
  const Place place = block->place();
  // Both are of the moment before the first column: `held` changes below, and other threads make calls.
  const bool alone = sums_ && call.alone() && !held.sum.defined();
  const bool written = sums_ && n_fired > 1 && !held.sum.defined();  // by a call that was taken for the only one
  bool summed = false;
  for (size_t number = 0; number < columns_.size(); ++number) {
    Column& column = *columns_[number];
    switch (column.calls) {
      case Calls::stack:
        held.parts.resize(columns_.size());
        held.parts[number].push_back(column.part(place, grad, mask, run->scale));
        break;
      case Calls::sum:
        TORCH_CHECK(!written, broken_rule(point.who, "a point", "fire as often as it was called since the last step",
                                          "once more", "Run one backward for each forward."));
        if (!alone) {
          column.check(grad);
          if (!std::exchange(summed, true)) add_to(held, point.who, grad);
          break;
        }
        [[fallthrough]];
      case Calls::raise:
      case Calls::last:
        column.write(place, grad, mask, run->scale);
        break;
    }
  }
}

void CacheKeeper::gradient(const Call& call, const at::Tensor& grad) {
  const at::AutoDispatchBelowADInplaceOrView no_autograd;
  cache_->gradient(place_, grad, calls_ == Calls::sum, call.alone());
}

}  // namespace tlfast
