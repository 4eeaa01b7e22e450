// The preallocated rows of one column.
#include "ring.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>

#include <limits>

#include "errors.h"

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
  const auto dims = dims_of(shape);
  return !shape.empty() && (dims.empty() || dims.front() != 0);
}

int64_t Ring::n_rows(at::IntArrayRef shape) const { return keeps_batch(shape) ? shape[0] : 1; }

at::Tensor Ring::fitting(at::IntArrayRef row_shape, const at::Tensor& like) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!rows_.defined()) {
    std::vector<int64_t> shape{capacity_};
    shape.insert(shape.end(), row_shape.begin(), row_shape.end());
    rows_ = at::full(shape, std::numeric_limits<double>::quiet_NaN(),
                     like.options().dtype(dtype_.value_or(like.scalar_type())));
  } else if (rows_.sizes().slice(1) != row_shape) {
    const auto list = [](at::IntArrayRef sizes) { return c10::str("[", c10::Join(", ", sizes), "]"); };
    TORCH_CHECK_VALUE(false, broken_rule(who, "a row", "have shape " + list(rows_.sizes().slice(1)) + " in every step",
                                         list(row_shape),
                                         "Pad the batches to one length, or reduce over the dimension that changes."));
  }
  return rows_;
}

at::Tensor Ring::check(const at::Tensor& grad) {
  const auto shape = reduced_shape(grad.sizes(), dims_of(grad.sizes()));
  return fitting(at::IntArrayRef(shape).slice(keeps_batch(grad.sizes()) ? 1 : 0), grad);
}

void Ring::reduce(const at::Tensor& out, const at::Tensor& grad, const std::optional<at::Tensor>& mask, double scale) {
  const Counts counts = capture(out, grad, reduction_, dims_, mask, scale);
  n_nonfinite += counts.nonfinite;
  n_saturated += counts.saturated;
}

void Ring::write(int64_t base, const at::Tensor& grad, const std::optional<at::Tensor>& mask, double scale) {
  const at::Tensor rows = check(grad);
  reduce(keeps_batch(grad.sizes()) ? rows.narrow(0, base, grad.size(0)) : rows.select(0, base), grad, mask, scale);
}

at::Tensor Ring::part(const at::Tensor& grad, const std::optional<at::Tensor>& mask, double scale) {
  const auto shape = reduced_shape(grad.sizes(), dims_of(grad.sizes()));
  const at::Tensor out = at::empty(shape, grad.options().dtype(dtype_.value_or(grad.scalar_type())));
  reduce(out, grad, mask, scale);
  return keeps_batch(grad.sizes()) ? out : out.unsqueeze(0);
}

void Ring::put_stack(int64_t base, int64_t n, const std::vector<at::Tensor>& parts) {
  const at::Tensor stacked = at::stack(parts, 1);
  fitting(stacked.sizes().slice(1), stacked).narrow(0, base, n).copy_(stacked);
}

void Ring::fill_nan(int64_t base, int64_t n) {
  const at::Tensor held = rows();
  if (held.defined()) held.narrow(0, base, n).fill_(std::numeric_limits<double>::quiet_NaN());
}

at::Tensor Ring::rows() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return rows_;
}

}  // namespace tlfast
