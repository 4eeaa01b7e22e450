// Preallocated rows.
#include "rows.h"

#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <utility>

#include "kernel/errors.h"

namespace tlfast {

at::Tensor Rows::fitting(at::IntArrayRef row_shape, at::ScalarType dtype, const at::Tensor& like) {
  std::lock_guard<std::mutex> lock(mutex_);
  const bool reshapable = std::exchange(reshapable_, false);
  if (rows_.defined() && reshapable && (rows_.sizes().slice(1) != row_shape || rows_.scalar_type() != dtype)) {
    rows_.reset();
    ++generation_;
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
            who_, "a row", "have shape " + list_of(rows_.sizes().slice(1)) + " in every step", list_of(row_shape),
            "Pad the batches to one length, reduce over the dimension that changes, or clear() before it does."));
  }
  return rows_;
}

at::Tensor Rows::tensor() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return rows_;
}

void Rows::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  reshapable_ = true;
  ++generation_;
}

void Rows::put(const Place& place, const at::Tensor& rows, const at::Tensor& values) {
  const at::Tensor out = rows.narrow(0, place.base, values.size(0));
  if (!on_gpu(out)) {
    out.copy_(values);
    return;
  }
  // By our kernel also outside of a recording: the warm-up loads what the recording launches.
  const Plan plan = make_plan(who_, out, values, Reduction::none, {}, {});
  if (plan.empty) return;
  const c10::Stream stream = current_stream(out.device());
  come_after_filling(place, stream);
  used_on(stream);
  const Operands with{
      .grad = values.const_data_ptr(), .ref = nullptr, .mask = nullptr, .out = out.mutable_data_ptr(), .scale = 1.0};
  plan.launch(who_, stream, with, {.cursor = place.cursor, .row_elements = out.stride(0)});
}

void Rows::fill_nan(const Place& place, int64_t n) {
  const at::Tensor held = tensor();
  if (!held.defined()) return;
  auto shape = held.sizes().vec();
  shape[0] = n;
  put(place, held, at::full({}, std::numeric_limits<double>::quiet_NaN(), held.options()).expand(shape));
}

void Rows::used_on(const c10::Stream& stream) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!rows_.defined() || !filled_on_ || stream == *filled_on_ || stream.device() != filled_on_->device() ||
      std::find(used_on_.begin(), used_on_.end(), stream) != used_on_.end())
    return;
  used_on_.push_back(stream);
  read_on(stream, rows_);
  if (counters_.defined()) read_on(stream, counters_);
}

// Not in a recording: it can't wait for what it doesn't hold, and begins when the device is idle.
void Rows::come_after_filling(const Place& place, const c10::Stream& stream) const {
  if (place.cursor) return;
  std::lock_guard<std::mutex> lock(mutex_);
  wait_for(rows_filled_, stream);
  wait_for(counters_filled_, stream);
}

int64_t* Rows::device_counters(const Place& place, const at::Tensor& like) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!counters_.defined()) {
    TORCH_CHECK(!place.cursor, broken_rule(who_, "a recorded step", "have been run before, so that its rows are there",
                                           "the first run", "Warm the step up."));
    counters_ = at::zeros({kCounters}, like.options().dtype(at::kLong));
    counters_filled_ = done_by_now(current_stream(like.device()));
  }
  return counters_.mutable_data_ptr<int64_t>();
}

void Rows::count(const Counts& counts) {
  if (counts.nonfinite) {
    n_nonfinite_ += counts.nonfinite;
    n_saturated_ += counts.saturated;
  }
}

at::Tensor Rows::counters() const {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (counters_.defined()) return counters_;
  }
  return at::tensor({n_nonfinite_.load(), n_saturated_.load(), n_writes_.load()}, at::kLong);
}

Counts Rows::counted() const {
  const at::Tensor host = counters().cpu();
  const int64_t* const n = host.const_data_ptr<int64_t>();
  TORCH_CHECK(n[kWrites] == n_writes_,
              broken_rule(who_, "rows", c10::str("have been written ", n_writes_.load(), " times"), n[kWrites],
                          "Don't use them: a launch or a replay was lost."));
  return {n[kNonfinite], n[kSaturated]};
}

void Rows::save_counts() {
  saved_ = counters().clone();
  saved_writes_ = n_writes_;
}

void Rows::restore_counts() {
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

void Rows::replayed(int64_t n_writes) {
  n_writes_ += n_writes;
  std::lock_guard<std::mutex> lock(mutex_);
  reshapable_ = false;
}

}  // namespace tlfast
