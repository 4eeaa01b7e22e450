// The preallocated rows of one column.
#include "ring.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "kernel/errors.h"

namespace tlfast {

Ring::Ring(std::string column_, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype,
           int64_t capacity)
    : column(std::move(column_)),
      who("capture at " + column),
      reduction_(reduction),
      dims_(std::move(dims)),
      dtype_(dtype),
      capacity_(capacity) {}

std::vector<int64_t> Ring::dims_of(at::IntArrayRef shape) const {
  return normal_dims(who, dims_, int64_t(shape.size()));
}

bool Ring::keeps_batch(at::IntArrayRef shape) const {
  const int64_t n = int64_t(shape.size());
  bool keeps = n > 0;
  for (int64_t d : dims_) {
    if (d < -n || d >= n) dims_of(shape);  // throws
    keeps &= d != 0 && d != -n;
  }
  return keeps;
}

int64_t Ring::n_rows(at::IntArrayRef shape) const { return keeps_batch(shape) ? shape[0] : 1; }

at::Tensor Ring::fitting(at::IntArrayRef row_shape, const at::Tensor& like) {
  std::lock_guard<std::mutex> lock(mutex_);
  const at::ScalarType dtype = dtype_.value_or(like.scalar_type());
  const bool reshapable = std::exchange(reshapable_, false);
  if (rows_.defined() && reshapable && (rows_.sizes().slice(1) != row_shape || rows_.scalar_type() != dtype)) {
    rows_.reset();
    forget_known();
  }
  if (!rows_.defined()) {
    std::vector<int64_t> shape{capacity_};
    shape.insert(shape.end(), row_shape.begin(), row_shape.end());
    rows_ = at::full(shape, std::numeric_limits<double>::quiet_NaN(), like.options().dtype(dtype));
    if (on_gpu(rows_)) {
      filled_on_ = current_stream(rows_.device());
      used_on_.clear();
      rows_filled_ = done_by_now(*filled_on_);
    }
  } else if (rows_.sizes().slice(1) != row_shape) {
    TORCH_CHECK_VALUE(
        false,
        broken_rule(
            who, "a row", "have shape " + list_of(rows_.sizes().slice(1)) + " in every step", list_of(row_shape),
            "Pad the batches to one length, reduce over the dimension that changes, or clear() before it does."));
  }
  return rows_;
}

at::Tensor Ring::check(const at::Tensor& grad) {
  const auto shape = reduced_shape(grad.sizes(), dims_of(grad.sizes()));
  return fitting(at::IntArrayRef(shape).slice(keeps_batch(grad.sizes()) ? 1 : 0), grad);
}

void Ring::count(const Counts& counts) {
  if (counts.nonfinite) {
    n_nonfinite_ += counts.nonfinite;
    n_saturated_ += counts.saturated;
  }
}

bool Ring::Known::fits(const at::Tensor& grad, const std::optional<at::Tensor>& mask,
                       const std::optional<c10::Stream>& on) const {
  return grad.scalar_type() == dtype && grad.device() == device && stream == on &&
         grad.sizes() == at::IntArrayRef(sizes) && grad.strides() == at::IntArrayRef(strides) &&
         mask.has_value() == !mask_sizes.empty() &&
         (!mask || (mask->device() == device && mask->sizes() == at::IntArrayRef(mask_sizes) &&
                    mask->strides() == at::IntArrayRef(mask_strides)));
}

std::shared_ptr<const Ring::Known> Ring::recall(const at::Tensor& grad, const std::optional<at::Tensor>& mask,
                                                const std::optional<c10::Stream>& stream) const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& known : known_)
    if (known->fits(grad, mask, stream)) return known;
  return nullptr;
}

std::shared_ptr<const Ring::Known> Ring::learn(const at::Tensor& grad, const std::optional<at::Tensor>& mask,
                                               const Place& place, const std::optional<c10::Stream>& stream) {
  if (on_gpu(grad)) device_counters(place, grad);
  const at::Tensor rows = check(grad);
  const at::Tensor out = keeps_batch(grad.sizes()) ? rows.narrow(0, 0, grad.size(0)) : rows.select(0, 0);
  auto made = std::make_shared<Known>(Known{grad.sizes().vec(),
                                            grad.strides().vec(),
                                            {},
                                            {},
                                            grad.scalar_type(),
                                            grad.device(),
                                            make_plan(who, out, grad, reduction_, dims_, mask),
                                            static_cast<char*>(rows.mutable_data_ptr()),
                                            rows.stride(0) * int64_t(rows.element_size()),
                                            stream,
                                            rows.stride(0),
                                            {}});
  if (mask) {
    made->mask_sizes = mask->sizes().vec();
    made->mask_strides = mask->strides().vec();
  }
  if (on_gpu(grad)) {
    made->scratch = scratch_for(made->plan.call(nullptr, nullptr, nullptr, 1.0), grad);
    come_after_filling(place, *stream);
    used_on(*stream);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  if (known_.size() < kGeometries)
    known_.push_back(made);
  else
    known_[std::exchange(oldest_known_, (oldest_known_ + 1) % kGeometries)] = made;
  return made;
}

// The mask of a step where it is about the gradients of this column.
const std::optional<at::Tensor>& Ring::own(const std::optional<at::Tensor>& mask) const {
  static const std::optional<at::Tensor> none;
  return masked ? mask : none;
}

void Ring::write(const Place& place, const at::Tensor& grad, const std::optional<at::Tensor>& mask_of_step,
                 double scale) {
  const std::optional<at::Tensor>& mask = own(mask_of_step);
  std::optional<c10::Stream> stream;
  if (on_gpu(grad)) stream = current_stream(grad.device());
  auto known = recall(grad, mask, stream);
  if (!known) known = learn(grad, mask, place, stream);
  const void* const mask_data = mask ? mask->const_data_ptr() : nullptr;
  if (stream) return launch(*known, place, grad, mask_data, scale);
  count(known->plan.run(grad.const_data_ptr(), known->rows + place.base * known->row_bytes, mask_data, scale));
}

void Ring::launch(const Known& known, const Place& place, const at::Tensor& grad, const void* mask, double scale) {
  if (known.plan.empty) return;
  int64_t* const counters = device_counters(place, grad);
  CudaCapture call = known.plan.call(grad.const_data_ptr(), known.rows + place.base * known.row_bytes, mask, scale);
  call.cursor = place.cursor;
  call.row_elements = known.row_elements;
  call.counters = counters;
  call.scratch = known.scratch.defined() ? known.scratch.mutable_data_ptr() : nullptr;
  {
    // Of a reduction that is split, the merge must come right behind its parts, whose scratch others may use.
    std::unique_lock<std::mutex> both(launching_, std::defer_lock);
    if (known.scratch.defined()) both.lock();
    launch_capture(who, *known.stream, call);
  }
  launched(place);
  if (!place.cursor || !known.scratch.defined()) return;
  std::lock_guard<std::mutex> lock(mutex_);
  recorded_.push_back(known.scratch);
}

// Rows and counters were filled on the stream of the first gradient; the stream of another backward comes after that.
// Not in a recording: it can't wait for what it doesn't hold, and begins when the device is idle.
void Ring::come_after_filling(const Place& place, const c10::Stream& stream) const {
  if (place.cursor) return;
  std::lock_guard<std::mutex> lock(mutex_);
  wait_for(rows_filled_, stream);
  wait_for(counters_filled_, stream);
}

void Ring::used_on(const c10::Stream& stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!rows_.defined() || !filled_on_ || stream == *filled_on_ || stream.device() != filled_on_->device() ||
      std::find(used_on_.begin(), used_on_.end(), stream) != used_on_.end())
    return;
  used_on_.push_back(stream);
  read_on(stream, rows_);
  if (counters_.defined()) read_on(stream, counters_);
}

// They hold the address of the rows.
void Ring::forget_known() {
  known_.clear();
  oldest_known_ = 0;
}

at::Tensor Ring::part(const Place& place, const at::Tensor& grad, const std::optional<at::Tensor>& mask_of_step,
                      double scale) {
  const std::optional<at::Tensor>& mask = own(mask_of_step);
  const auto shape = reduced_shape(grad.sizes(), dims_of(grad.sizes()));
  const at::Tensor out = at::empty(shape, grad.options().dtype(dtype_.value_or(grad.scalar_type())));
  const Plan plan = make_plan(who, out, grad, reduction_, dims_, mask);
  const bool gpu = on_gpu(grad) && !plan.empty;
  int64_t* const counters = gpu ? device_counters(place, grad) : nullptr;
  if (gpu) come_after_filling(place, current_stream(grad.device()));
  count(run_plan(who, plan, out, grad, mask, scale, counters));
  if (gpu) launched(place);
  return keeps_batch(grad.sizes()) ? out : out.unsqueeze(0);
}

int64_t* Ring::device_counters(const Place& place, const at::Tensor& like) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!counters_.defined()) {
    TORCH_CHECK(!place.cursor, broken_rule(who, "a recorded step", "have been run before, so that its rows are there",
                                           "the first run", "Warm the step up."));
    counters_ = at::zeros({kCounters}, like.options().dtype(at::kLong));
    counters_filled_ = done_by_now(current_stream(like.device()));
  }
  return counters_.mutable_data_ptr<int64_t>();
}

// Rows as they are, [n, ...].
void Ring::put(const Place& place, const at::Tensor& rows, const at::Tensor& values) {
  const at::Tensor out = rows.narrow(0, place.base, values.size(0));
  if (!on_gpu(out)) {
    out.copy_(values);
    return;
  }
  // By our kernel also outside of a recording: the warm-up loads what the recording launches.
  const Plan plan = make_plan(who, out, values, Reduction::none, {}, {});
  if (plan.empty) return;
  const c10::Stream stream = current_stream(out.device());
  come_after_filling(place, stream);
  used_on(stream);
  CudaCapture call = plan.call(values.const_data_ptr(), out.mutable_data_ptr(), nullptr, 1.0);
  call.cursor = place.cursor;
  call.row_elements = out.stride(0);
  launch_capture(who, stream, call);
}

void Ring::put_stack(const Place& place, const std::vector<at::Tensor>& parts) {
  const at::Tensor stacked = at::stack(parts, 1);
  put(place, fitting(stacked.sizes().slice(1), stacked), stacked);
}

void Ring::fill_nan(const Place& place, int64_t n) {
  const at::Tensor held = rows();
  if (!held.defined()) return;
  auto shape = held.sizes().vec();
  shape[0] = n;
  put(place, held, at::full({}, std::numeric_limits<double>::quiet_NaN(), held.options()).expand(shape));
}

void Ring::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  reshapable_ = true;
  forget_known();
}

void Ring::replayed(int64_t n_writes) {
  n_writes_ += n_writes;
  std::lock_guard<std::mutex> lock(mutex_);
  reshapable_ = false;
}

at::Tensor Ring::rows() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return rows_;
}

at::Tensor Ring::counters() const {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (counters_.defined()) return counters_;
  }
  return at::tensor({n_nonfinite_.load(), n_saturated_.load(), n_writes_.load()}, at::kLong);
}

void Ring::check_recorded_on(const at::Device& device) const {
  const at::Tensor held = rows();
  TORCH_CHECK(!held.defined() || held.device() == device,
              broken_rule("graph_step", "all rows", c10::str("be on ", device, ", as inputs[0] is"),
                          c10::str(held.device(), " at ", column), "Run the step itself."));
}

void Ring::save_counts() {
  saved_ = counters().clone();
  saved_writes_ = n_writes_;
}

void Ring::restore_counts() {
  n_writes_ = saved_writes_;
  std::lock_guard<std::mutex> lock(mutex_);
  if (counters_.defined()) {
    if (saved_.device() == counters_.device())
      counters_.copy_(saved_);
    else
      counters_.zero_();  // they are there only since the trial
  } else {
    n_nonfinite_ = saved_.const_data_ptr<int64_t>()[kNonfinite];
    n_saturated_ = saved_.const_data_ptr<int64_t>()[kSaturated];
  }
}

Counts Ring::counted() const {
  const at::Tensor host = counters().cpu();
  const int64_t* const n = host.const_data_ptr<int64_t>();
  TORCH_CHECK(n[kWrites] == n_writes_,
              broken_rule(who, "rows", c10::str("have been written ", n_writes_.load(), " times"), n[kWrites],
                          "Don't use them: a launch or a replay was lost."));
  return {n[kNonfinite], n[kSaturated]};
}

}  // namespace tlfast
