// What a column computes of a gradient: immutable, and knows no memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "capture.h"
#include "weight.h"

namespace tlfast {

// What a recipe reads of a call: its gradient, its activation, the gradient's product, element by element, with the
// activation or with a tensor that the step gives, or the gradient of the module's weight.
enum class Of { grad, act, with_act, with_ref, weight };
Of parse_of(const std::string& name);

// What a tap saw of a call, in its backward. The activation is undefined where no recipe reads it.
struct Seen {
  const at::Tensor& grad;
  const at::Tensor& act;
  const std::vector<at::Tensor>* kept = nullptr;  // of its input, for each column of weight gradients
};

// What a step gives a column beside that.
struct Given {
  const std::optional<at::Tensor>& mask;
  const std::optional<at::Tensor>& ref;
  const std::optional<at::Tensor>& at;  // int64 on the host: a position of each example [B], or several [B, k]
  bool own_mask;                        // the mask is the column's own, and may choose positions in place of `at`
  double scale;                         // the factor on gradients
};

// As what the gradient, and what it is multiplied with, are read.
struct Form {
  std::optional<std::pair<int64_t, int64_t>> heads;  // the last dimension is as many heads as the first, of so many
  std::optional<std::vector<int64_t>> at;            // positions of dimension 1; empty: the step gives them
  bool one = false;                                  // of one position, whose dimension isn't kept
};

// What is reduced: what was seen, or a view of it, or the few positions of it that are chosen.
struct Read {
  at::Tensor tensor;
  std::optional<at::Tensor> ref, mask;
  bool one = false;  // dimension 1 is a single position, and isn't kept
};

class Recipe {
 public:
  // `who` is named by its errors; without a dtype the rows have that of what is read.
  Recipe(std::string who, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype, Of of,
         Form form, std::shared_ptr<const Weight> weight);

  // What is reduced, what it is multiplied with, and the factor on the rows: that of a loss is in no activation.
  Read read(const Seen& seen, const Given& given) const;
  double scale(double of_loss) const { return of == Of::act ? 1.0 : weight ? weight->scale(of_loss) : of_loss; }

  // Whether a call must keep its output, or input, for its backward.
  bool reads_act() const { return of == Of::act || of == Of::with_act; }

  // Whether the rows of several calls are what adds up, and not what they are made of.
  bool adds_rows() const { return of == Of::with_act || of == Of::weight; }

  // Whether the gradients of several calls are.
  bool adds_gradients() const { return of == Of::grad || of == Of::with_ref; }

  // How many rows a gradient of this shape makes: one an example, or one where the batch is reduced.
  int64_t n_rows(at::IntArrayRef shape) const {
    return keeps_batch(int64_t(shape.size()) + form_.heads.has_value()) ? shape[0] : 1;
  }

  // The shape of one of these rows, and its dtype.
  std::vector<int64_t> row_shape(const Read& read) const;
  at::ScalarType row_dtype(const at::Tensor& read) const { return dtype_.value_or(read.scalar_type()); }

  // Of rows, the first ones, in the shape that this is reduced to.
  at::Tensor first_of(const at::Tensor& rows, const Read& read) const;

  // How it is written into `out`, checked.
  Plan plan(const at::Tensor& out, const Read& read) const;

  // Memory for the rows of one call alone, in the shape that it is reduced to.
  at::Tensor empty_for(const Read& read, at::ScalarType dtype) const;

  bool keeps_batch(int64_t n_dims) const;

  const Of of;
  const std::shared_ptr<const Weight> weight;  // of `Of::weight`

 private:
  std::vector<int64_t> dims_of(const Read& read) const;
  at::Tensor spread(const std::optional<at::Tensor>& ref, const at::Tensor& grad) const;
  void choose(Read& read, const Given& given) const;
  at::Tensor in_heads(const at::Tensor& tensor) const;

  const std::string who_;
  const Reduction reduction_;
  const std::vector<int64_t> dims_;
  const std::optional<at::ScalarType> dtype_;
  const Form form_;
};

}  // namespace tlfast
