// A column writes gradients into its rows.
#include "column.h"

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
               int64_t capacity, Calls calls)
    : name(std::move(name_)),
      who("capture at " + name),
      calls(calls),
      recipe(who, reduction, std::move(dims), dtype),
      rows(who, capacity) {}

at::Tensor Column::fitting(const at::Tensor& grad) {
  return rows.fitting(recipe.row_shape(grad.sizes()), recipe.row_dtype(grad), grad);
}

bool Column::Known::fits(const at::Tensor& grad, const std::optional<at::Tensor>& mask,
                         const std::optional<c10::Stream>& on) const {
  return grad.scalar_type() == dtype && grad.device() == device && stream == on &&
         grad.sizes() == at::IntArrayRef(sizes) && grad.strides() == at::IntArrayRef(strides) &&
         mask.has_value() == !mask_sizes.empty() &&
         (!mask || (mask->device() == device && mask->sizes() == at::IntArrayRef(mask_sizes) &&
                    mask->strides() == at::IntArrayRef(mask_strides)));
}

std::shared_ptr<const Column::Known> Column::recall(const at::Tensor& grad, const std::optional<at::Tensor>& mask,
                                                    const std::optional<c10::Stream>& stream) const {
  const int64_t generation = rows.generation();
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& known : known_)
    if (known->generation == generation && known->fits(grad, mask, stream)) return known;
  return nullptr;
}

std::shared_ptr<const Column::Known> Column::learn(const at::Tensor& grad, const std::optional<at::Tensor>& mask,
                                                   const Place& place, const std::optional<c10::Stream>& stream) {
  if (on_gpu(grad)) rows.device_counters(place, grad);
  const at::Tensor held = fitting(grad);
  auto made = std::make_shared<Known>(Known{
      .generation = rows.generation(),
      .sizes = grad.sizes().vec(),
      .strides = grad.strides().vec(),
      .mask_sizes = mask ? mask->sizes().vec() : std::vector<int64_t>(),
      .mask_strides = mask ? mask->strides().vec() : std::vector<int64_t>(),
      .dtype = grad.scalar_type(),
      .device = grad.device(),
      .plan = recipe.plan(recipe.first_of(held, grad), grad, mask),
      .rows = static_cast<char*>(held.mutable_data_ptr()),
      .row_bytes = held.stride(0) * int64_t(held.element_size()),
      .stream = stream,
      .row_elements = held.stride(0),
      .scratch = {},
  });
  if (on_gpu(grad)) {
    made->scratch = made->plan.scratch(grad);
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

// The mask of a step where it is about the gradients of this column, or the one that it has for itself.
const std::optional<at::Tensor>& Column::own(const std::optional<at::Tensor>& mask) const {
  static const std::optional<at::Tensor> none;
  if (own_mask) return own_mask;
  return masked ? mask : none;
}

void Column::write(const Place& place, const at::Tensor& grad, const std::optional<at::Tensor>& mask_of_step,
                   double scale) {
  const std::optional<at::Tensor>& mask = own(mask_of_step);
  std::optional<c10::Stream> stream;
  if (on_gpu(grad)) stream = current_stream(grad.device());
  auto known = recall(grad, mask, stream);
  if (!known) known = learn(grad, mask, place, stream);
  const Operands with{.grad = grad.const_data_ptr(),
                      .ref = nullptr,
                      .mask = mask ? mask->const_data_ptr() : nullptr,
                      .out = known->rows + place.base * known->row_bytes,
                      .scale = scale};
  if (!stream) return rows.count(known->plan.run(with));
  if (!known->plan.empty) launch(*known, place, with, rows.device_counters(place, grad));
}

void Column::launch(const Known& known, const Place& place, const Operands& with, int64_t* counters) {
  const OnDevice there{place.cursor, known.row_elements, counters, known.scratch};
  {
    // Of a reduction that is split, the merge must come right behind its parts, whose scratch others may use.
    std::unique_lock<std::mutex> both(launching_, std::defer_lock);
    if (known.scratch.defined()) both.lock();
    known.plan.launch(who, *known.stream, with, there);
  }
  rows.launched(place);
  if (!place.cursor || !known.scratch.defined()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  recorded_.push_back(known.scratch);
}

std::vector<at::Tensor> Column::take_recorded_scratch() {
  std::lock_guard<std::mutex> lock(mutex_);
  return std::exchange(recorded_, {});
}

at::Tensor Column::part(const Place& place, const at::Tensor& grad, const std::optional<at::Tensor>& mask_of_step,
                        double scale) {
  const std::optional<at::Tensor>& mask = own(mask_of_step);
  const at::Tensor out = recipe.empty_for(grad);
  const Plan plan = recipe.plan(out, grad, mask);
  const bool gpu = on_gpu(grad) && !plan.empty;
  int64_t* const counters = gpu ? rows.device_counters(place, grad) : nullptr;
  if (gpu) rows.come_after_filling(place, current_stream(grad.device()));
  rows.count(run_plan(who, plan, out, grad, mask, scale, counters));
  if (gpu) rows.launched(place);
  return recipe.keeps_batch(grad.sizes()) ? out : out.unsqueeze(0);
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
