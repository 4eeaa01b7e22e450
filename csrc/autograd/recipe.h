// What a column computes of a gradient: immutable, and knows no memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "capture.h"

namespace tlfast {

// What a recipe reads of a call: its gradient, its activation, or their product, element by element.
enum class Of { grad, act, product };
Of parse_of(const std::string& name);

// What a tap saw of a call, in its backward. The activation is undefined where no recipe reads it.
struct Seen {
  const at::Tensor& grad;
  const at::Tensor& act;
};

class Recipe {
 public:
  // `who` is named by its errors; without a dtype the rows have that of what is read.
  Recipe(std::string who, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype, Of of);

  // What is reduced, what it is multiplied with, and the factor on the rows: that of a loss is in no activation.
  const at::Tensor& read(const Seen& seen) const { return of == Of::act ? seen.act : seen.grad; }
  std::optional<at::Tensor> ref(const Seen& seen) const {
    return of == Of::product ? std::optional(seen.act) : std::nullopt;
  }
  double scale(double of_loss) const { return of == Of::act ? 1.0 : of_loss; }

  // How many rows a gradient of this shape makes: one an example, or one where the batch is reduced.
  int64_t n_rows(at::IntArrayRef shape) const { return keeps_batch(shape) ? shape[0] : 1; }

  // The shape of one of these rows, and its dtype.
  std::vector<int64_t> row_shape(at::IntArrayRef shape) const;
  at::ScalarType row_dtype(const at::Tensor& grad) const { return dtype_.value_or(grad.scalar_type()); }

  // Of rows, the first ones, in the shape that this gradient is reduced to.
  at::Tensor first_of(const at::Tensor& rows, const at::Tensor& grad) const;

  // How a gradient, or its product with `ref`, is written into `out`, checked.
  Plan plan(const at::Tensor& out, const at::Tensor& grad, const std::optional<at::Tensor>& mask,
            const std::optional<at::Tensor>& ref = std::nullopt) const;

  // Memory for the rows of one gradient alone, in the shape that it is reduced to.
  at::Tensor empty_for(const at::Tensor& grad, at::ScalarType dtype) const;

  bool keeps_batch(at::IntArrayRef shape) const;

  const Of of;

 private:
  std::vector<int64_t> dims_of(at::IntArrayRef shape) const;

  const std::string who_;
  const Reduction reduction_;
  const std::vector<int64_t> dims_;
  const std::optional<at::ScalarType> dtype_;
};

}  // namespace tlfast
