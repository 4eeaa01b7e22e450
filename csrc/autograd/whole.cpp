// Rows of whole weight gradients.
#include "whole.h"

#include <ATen/ops/matmul.h>

#include <utility>

#include "kernel/errors.h"
#include "plain.h"

namespace tlfast {

Whole::Whole(std::optional<at::Tensor> factor, std::optional<at::Tensor> matrix, std::shared_ptr<const Sketcher> sketch,
             Project project)
    : factor_(std::move(factor)), matrix_(std::move(matrix)), sketch_(std::move(sketch)), project_(std::move(project)) {
  const auto check = [](const char* argument, const std::optional<at::Tensor>& given) {
    const bool fits = !given || (at::isFloatingType(given->scalar_type()) && is_plain(*given) && given->dim() == 2 &&
                                 given->numel() > 0);
    TORCH_CHECK_VALUE(fits, broken_rule("capture", argument, "be a matrix", given ? list_of(given->sizes()) : "none",
                                        "Make it by Spec(of=\"weight\")."));
  };
  check("factor", factor_);
  check("matrix", matrix_);
  const bool something = factor_ || matrix_ || project_;
  TORCH_CHECK_VALUE(something && (!sketch_ || project_) && !(matrix_ && project_),
                    broken_rule("capture", "project", "be there beside a sketch, and not beside a matrix",
                                project_ ? "one" : "none", "Make it by Spec(of=\"weight\")."));
}

at::Tensor Whole::normalized(at::Tensor gradients) const {
  if (!factor_) return gradients;
  const at::Tensor factor = moved_.like(*factor_, gradients);
  TORCH_CHECK_VALUE(
      factor.sizes() == gradients.sizes().slice(1),
      broken_rule("capture", "factor", "have the shape of a gradient, " + list_of(gradients.sizes().slice(1)),
                  list_of(factor.sizes()), "Make it by Spec(of=\"weight\")."));
  return gradients.mul_(factor);
}

at::Tensor Whole::projected(const at::Tensor& flat) const {
  if (matrix_) return at::matmul(flat, moved_.like(*matrix_, flat).t());
  if (sketch_ && flat.is_cpu() && flat.scalar_type() == at::kFloat) return *sketch_->rows(flat.contiguous());
  return project_(flat);
}

}  // namespace tlfast
