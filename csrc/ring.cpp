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
  if (!rows_.defined()) {
    std::vector<int64_t> shape{capacity_};
    shape.insert(shape.end(), row_shape.begin(), row_shape.end());
    rows_ = at::full(shape, std::numeric_limits<double>::quiet_NaN(),
                     like.options().dtype(dtype_.value_or(like.scalar_type())));
  } else if (rows_.sizes().slice(1) != row_shape) {
    TORCH_CHECK_VALUE(
        false,
        broken_rule(who, "a row", "have shape " + list_of(rows_.sizes().slice(1)) + " in every step",
                    list_of(row_shape), "Pad the batches to one length, or reduce over the dimension that changes."));
  }
  return rows_;
}

at::Tensor Ring::check(const at::Tensor& grad) {
  const auto shape = reduced_shape(grad.sizes(), dims_of(grad.sizes()));
  return fitting(at::IntArrayRef(shape).slice(keeps_batch(grad.sizes()) ? 1 : 0), grad);
}

void Ring::count(const Counts& counts) {
  if (counts.nonfinite) {
    n_nonfinite += counts.nonfinite;
    n_saturated += counts.saturated;
  }
}

bool Ring::Known::fits(const at::Tensor& grad, const std::optional<at::Tensor>& mask) const {
  return grad.scalar_type() == dtype && grad.sizes() == at::IntArrayRef(sizes) &&
         grad.strides() == at::IntArrayRef(strides) && mask.has_value() == !mask_sizes.empty() &&
         (!mask || (mask->sizes() == at::IntArrayRef(mask_sizes) && mask->strides() == at::IntArrayRef(mask_strides)));
}

void Ring::write(int64_t base, const at::Tensor& grad, const std::optional<at::Tensor>& mask, double scale) {
  std::shared_ptr<const Known> known;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    known = known_;
  }
  if (!known || !grad.is_cpu() || !known->fits(grad, mask)) {
    const at::Tensor rows = check(grad);
    const at::Tensor out = keeps_batch(grad.sizes()) ? rows.narrow(0, 0, grad.size(0)) : rows.select(0, 0);
    auto made = std::make_shared<Known>(Known{grad.sizes().vec(),
                                              grad.strides().vec(),
                                              {},
                                              {},
                                              grad.scalar_type(),
                                              make_plan(who, out, grad, reduction_, dims_, mask),
                                              static_cast<char*>(rows.mutable_data_ptr()),
                                              rows.stride(0) * int64_t(rows.element_size())});
    if (mask) {
      made->mask_sizes = mask->sizes().vec();
      made->mask_strides = mask->strides().vec();
    }
    known = std::move(made);
    std::lock_guard<std::mutex> lock(mutex_);
    known_ = known;
  }
  count(known->plan.run(grad.const_data_ptr(), known->rows + base * known->row_bytes,
                        mask ? mask->const_data_ptr() : nullptr, scale));
}

at::Tensor Ring::part(const at::Tensor& grad, const std::optional<at::Tensor>& mask, double scale) {
  const auto shape = reduced_shape(grad.sizes(), dims_of(grad.sizes()));
  const at::Tensor out = at::empty(shape, grad.options().dtype(dtype_.value_or(grad.scalar_type())));
  count(make_plan(who, out, grad, reduction_, dims_, mask)
            .run(grad.const_data_ptr(), out.mutable_data_ptr(), mask ? mask->const_data_ptr() : nullptr, scale));
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
