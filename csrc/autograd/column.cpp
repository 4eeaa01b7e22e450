// A column writes gradients into its rows.
#include "column.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include <array>
#include <utility>

#include "kernel/errors.h"

namespace tlfast {

Calls parse_calls(const std::string& name) {
  static constexpr std::array kNames{"raise", "sum", "last", "stack"};  // in the order of Calls
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return Calls(i);
  const std::string rule = c10::str("be one of ", c10::Join(", ", kNames));
  TORCH_CHECK_VALUE(false, broken_rule("capture", "calls", rule, "'" + name + "'", "Check the spelling."));
}

Column::Column(std::string name_, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype,
               int64_t capacity, Calls calls, Of of, Form form, std::shared_ptr<const Weight> weight)
    : name(std::move(name_)),
      who("capture at " + name),
      calls(calls),
      recipe(who, reduction, std::move(dims), dtype, of, std::move(form), std::move(weight)),
      rows(who, capacity) {}

at::Tensor Column::fitting(const Read& read) {
  return rows.fitting(recipe.row_shape(read), recipe.row_dtype(read.tensor), read.tensor);
}

bool Column::Known::fits(const Read& read, const std::optional<c10::Stream>& on) const {
  const auto& [tensor, ref, mask, is_one] = read;
  // A plan was checked for a ref of what is read's sizes and device: another one is planned, and refused, anew.
  return tensor.scalar_type() == dtype && tensor.device() == device && stream == on && is_one == one &&
         tensor.sizes() == at::IntArrayRef(sizes) && tensor.strides() == at::IntArrayRef(strides) &&
         (!ref || (ref->scalar_type() == ref_dtype && ref->device() == device && !ref->is_alias_of(memory) &&
                   ref->sizes() == at::IntArrayRef(sizes) && ref->strides() == at::IntArrayRef(ref_strides))) &&
         mask.has_value() == !mask_sizes.empty() &&
         (!mask || (mask->device() == device && mask->sizes() == at::IntArrayRef(mask_sizes) &&
                    mask->strides() == at::IntArrayRef(mask_strides)));
}

std::shared_ptr<const Column::Known> Column::recall(const Read& read, const std::optional<c10::Stream>& stream) const {
  const int64_t generation = rows.generation();
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& known : known_)
    if (known->generation == generation && known->fits(read, stream)) return known;
  return nullptr;
}

std::shared_ptr<const Column::Known> Column::learn(const Read& read, const Place& place,
                                                   const std::optional<c10::Stream>& stream) {
  const at::Tensor& tensor = read.tensor;
  if (on_gpu(tensor)) rows.device_counters(place, tensor);
  const at::Tensor held = fitting(read);
  auto made = std::make_shared<Known>(Known{
      .generation = rows.generation(),
      .sizes = tensor.sizes().vec(),
      .strides = tensor.strides().vec(),
      .ref_strides = read.ref ? read.ref->strides().vec() : std::vector<int64_t>(),
      .mask_sizes = read.mask ? read.mask->sizes().vec() : std::vector<int64_t>(),
      .mask_strides = read.mask ? read.mask->strides().vec() : std::vector<int64_t>(),
      .dtype = tensor.scalar_type(),
      .ref_dtype = read.ref ? read.ref->scalar_type() : tensor.scalar_type(),
      .one = read.one,
      .device = tensor.device(),
      .plan = recipe.plan(recipe.first_of(held, read), read),
      .memory = held,
      .rows = static_cast<char*>(held.mutable_data_ptr()),
      .row_bytes = held.stride(0) * int64_t(held.element_size()),
      .stream = stream,
      .row_elements = held.stride(0),
      .scratch = {},
  });
  if (on_gpu(tensor)) {
    made->scratch = made->plan.scratch(tensor);
    rows.come_after_filling(place, *stream);
    rows.used_on(*stream);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(known_, [&](const auto& known) { return known->generation != made->generation; });
  if (known_.size() < kGeometries) {
    known_.push_back(made);
    oldest_known_ = 0;
  } else {
    known_[std::exchange(oldest_known_, (oldest_known_ + 1) % kGeometries)] = made;
  }
  return made;
}

// What is read for this column: with the mask of the step where it is about its gradients, or the one that it has for
// itself.
Read Column::read(const Place& place, const Seen& seen, const Step& step) const {
  static const std::optional<at::Tensor> none;
  const bool recording = place.cursor;
  std::optional<at::Tensor> own_mask, factor;
  if (step.own.mask) own_mask = step.own.mask->here(recording);
  if (const auto& given = step.own.ref ? step.own.ref : ref) factor = given->here(recording);
  const Given given{.mask = own_mask ? own_mask
                            : masked ? step.mask
                                     : none,
                    .ref = factor,
                    .at = step.own.at,
                    .own_mask = own_mask.has_value(),
                    .scale = step.scale};
  return recipe.read(seen, given);
}

void Column::check(const Place& place, const Seen& seen, const Step& step) {
  static const std::optional<at::Tensor> none;
  fitting(read(place, seen, {.mask = none, .scale = 1.0, .own = step.own}));
}

void Column::write(const Place& place, const Seen& seen, const Step& step) {
  const Read found = read(place, seen, step);
  std::optional<c10::Stream> stream;
  if (on_gpu(found.tensor)) stream = current_stream(found.tensor.device());
  auto known = recall(found, stream);
  if (!known) known = learn(found, place, stream);
  const Operands with{.grad = found.tensor.const_data_ptr(),
                      .ref = found.ref ? found.ref->const_data_ptr() : nullptr,
                      .mask = found.mask ? found.mask->const_data_ptr() : nullptr,
                      .out = known->rows + place.base * known->row_bytes,
                      .scale = recipe.scale(step.scale)};
  if (!stream) return rows.count(known->plan.run(with));
  if (!known->plan.empty) launch(*known, place, found, with, rows.device_counters(place, found.tensor));
}

void Column::launch(const Known& known, const Place& place, const Read& read, const Operands& with, int64_t* counters) {
  const OnDevice there{place.cursor, known.row_elements, counters, known.scratch};
  {
    // Of a reduction that is split, the merge must come right behind its parts, whose scratch others may use.
    std::unique_lock<std::mutex> both(launching_, std::defer_lock);
    if (known.scratch.defined()) both.lock();
    known.plan.launch(who, *known.stream, with, there);
  }
  rows.launched(place);
  hold_recorded(place, read, known.scratch);
}

// A replay reads its operands where they were; the model's own are the graph's.
void Column::hold_recorded(const Place& place, const Read& read, const at::Tensor& scratch) {
  if (!place.cursor) return;
  std::lock_guard<std::mutex> lock(mutex_);
  if (scratch.defined()) recorded_.push_back(scratch);
  if (read.ref && recipe.of == Of::with_ref) recorded_.push_back(*read.ref);
  if (read.mask) recorded_.push_back(*read.mask);
}

std::vector<at::Tensor> Column::take_recorded_scratch() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(recorded_, {});
}

// Run a plan into memory that isn't that of the rows, and count what it stores.
void Column::count_plan(const Place& place, const Plan& plan, const at::Tensor& out, const Read& read, double scale) {
  const bool gpu = on_gpu(read.tensor) && !plan.empty;
  int64_t* const counters = gpu ? rows.device_counters(place, read.tensor) : nullptr;
  if (gpu) rows.come_after_filling(place, current_stream(read.tensor.device()));
  rows.count(run_plan(who, plan, out, read.tensor, read.mask, scale, counters, read.ref));
  if (gpu) rows.launched(place);
}

at::Tensor Column::part(const Place& place, const Seen& seen, const Step& step) {
  const Read found = read(place, seen, step);
  const bool added = calls == Calls::sum || total;
  const auto dtype = added ? accumulator(found.tensor.scalar_type()) : recipe.row_dtype(found.tensor);
  const at::Tensor out = recipe.empty_for(found, dtype);
  const Plan plan = recipe.plan(out, found);
  const double scale = recipe.scale(step.scale);
  if (added)
    run_plan(who, plan, out, found.tensor, found.mask, scale, nullptr, found.ref);
  else
    count_plan(place, plan, out, found, scale);
  hold_recorded(place, found, {});
  return recipe.keeps_batch(found.tensor.dim()) ? out : out.unsqueeze(0);
}

void Column::put_sum(const Place& place, const at::Tensor& sum) {
  const at::Tensor held = rows.fitting(sum.sizes().slice(1), recipe.row_dtype(sum), sum);
  const at::Tensor rounded = at::empty(sum.sizes(), sum.options().dtype(held.scalar_type()));
  const Plan plan = make_plan(who, rounded, sum, Reduction::none, {}, {});
  count_plan(place, plan, rounded, {.tensor = sum, .ref = {}, .mask = {}}, 1.0);
  rows.put(place, held, rounded);
}

void Column::put_stack(const Place& place, const std::vector<at::Tensor>& parts) {
  const at::Tensor stacked = at::stack(parts, 1);
  rows.put(place, rows.fitting(stacked.sizes().slice(1), recipe.row_dtype(stacked), stacked), stacked);
}

void Column::check_recorded_on(const at::Device& device) const {
  const at::Tensor held = rows.tensor();
  TORCH_CHECK(!held.defined() || held.device() == device,
              broken_rule("graph_step", "all rows", c10::str("be on ", device, ", as inputs[0] is"),
                          c10::str(held.device(), " at ", name), "Run the step itself."));
}

}  // namespace tlfast
