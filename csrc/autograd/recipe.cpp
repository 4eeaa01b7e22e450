// What a column computes of a gradient.
#include "recipe.h"

#include <ATen/ops/empty.h>

#include <utility>

namespace tlfast {

Recipe::Recipe(std::string who, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype)
    : who_(std::move(who)), reduction_(reduction), dims_(std::move(dims)), dtype_(dtype) {}

std::vector<int64_t> Recipe::dims_of(at::IntArrayRef shape) const {
  return normal_dims(who_, dims_, int64_t(shape.size()));
}

bool Recipe::keeps_batch(at::IntArrayRef shape) const {
  const int64_t n = int64_t(shape.size());
  bool keeps = n > 0;
  for (int64_t d : dims_) {
    if (d < -n || d >= n) dims_of(shape);  // throws
    keeps &= d != 0 && d != -n;
  }
  return keeps;
}

std::vector<int64_t> Recipe::row_shape(at::IntArrayRef shape) const {
  auto left = reduced_shape(shape, dims_of(shape));
  if (keeps_batch(shape)) left.erase(left.begin());
  return left;
}

at::Tensor Recipe::first_of(const at::Tensor& rows, const at::Tensor& grad) const {
  return keeps_batch(grad.sizes()) ? rows.narrow(0, 0, grad.size(0)) : rows.select(0, 0);
}

Plan Recipe::plan(const at::Tensor& out, const at::Tensor& grad, const std::optional<at::Tensor>& mask,
                  const std::optional<at::Tensor>& ref) const {
  return make_plan(who_, out, grad, reduction_, dims_, mask, ref);
}

at::Tensor Recipe::empty_for(const at::Tensor& grad) const {
  return at::empty(reduced_shape(grad.sizes(), dims_of(grad.sizes())), grad.options().dtype(row_dtype(grad)));
}

}  // namespace tlfast
