// What a column computes of a gradient.
#include "recipe.h"

#include <ATen/ops/empty.h>

#include <array>
#include <utility>

#include "kernel/errors.h"

namespace tlfast {

Of parse_of(const std::string& name) {
  static constexpr std::array kNames{"grad", "act", "grad*act"};  // in the order of Of
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return Of(i);
  const std::string rule = c10::str("be one of ", c10::Join(", ", kNames));
  TORCH_CHECK_VALUE(false, broken_rule("capture", "of", rule, "'" + name + "'", "Check the spelling."));
}

Recipe::Recipe(std::string who, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype,
               Of of)
    : of(of), who_(std::move(who)), reduction_(reduction), dims_(std::move(dims)), dtype_(dtype) {}

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

at::Tensor Recipe::empty_for(const at::Tensor& grad, at::ScalarType dtype) const {
  return at::empty(reduced_shape(grad.sizes(), dims_of(grad.sizes())), grad.options().dtype(dtype));
}

}  // namespace tlfast
