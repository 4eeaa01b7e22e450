// A sketch of tensors on the CPU: its signs and shifts as memory that is held, and rows through it without the GIL.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "kernel/sketch.h"

namespace tlfast {

// One side of one module's sketch, for rows of one dtype. Immutable, so that any thread may use it.
class Sketcher {
 public:
  // As tlfast.projections.sketches makes them: input_signs [n_parts, columns]; of a count sketch the shifts
  // [n_parts, n_blocks]; of a Hadamard sketch output_signs [n_blocks, width] and samples [dim].
  Sketcher(int64_t width, int64_t dim, double scale, at::Tensor input_signs, const std::optional<at::Tensor>& shifts,
           const std::optional<at::Tensor>& output_signs, const std::optional<at::Tensor>& samples);

  // [n, columns] -> [n, dim], in the same dtype. None of what isn't plain memory, or is in a graph of autograd: that is
  // left to the caller.
  std::optional<at::Tensor> rows(const at::Tensor& x) const;

 private:
  void check_numbers() const;

  const at::Tensor input_signs_, shifts_, output_signs_, samples_;
  Sketch sketch_;
};

}  // namespace tlfast
