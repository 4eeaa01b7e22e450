// The fused op: a gradient in, reduced, cast and copied into preallocated memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "kernel/capture_cpu.h"
#include "kernel/capture_cuda.h"

namespace tlfast {

Reduction parse_reduction(const std::string& name);

// `dims` as sorted, non-negative numbers; an error where one is out of range or named twice.
std::vector<int64_t> normal_dims(const std::string& who, at::IntArrayRef dims, int64_t n_dims);

// The shape that is left when the (normal) dims are reduced away.
std::vector<int64_t> reduced_shape(at::IntArrayRef shape, at::IntArrayRef dims);

// One call's geometry and types, checked: it fits every tensor of the same sizes, strides and dtypes.
struct Plan {
  View view;
  Reduction reduction;
  Dtype grad_dtype, out_dtype;
  bool empty;

  Counts run(const void* grad, void* out, const void* mask, double scale) const;  // on the CPU

  // A call on a GPU; where its rows begin and what counts them is filled in by who knows.
  CudaCapture call(const void* grad, void* out, const void* mask, double scale) const;
};

// Check everything, in the name of `who`, of plain tensors. `over` is ignored by Reduction::none.
Plan make_plan(const std::string& who, const at::Tensor& out, const at::Tensor& grad, Reduction reduction,
               at::IntArrayRef over, const std::optional<at::Tensor>& mask);

// Run a plan once, on the device of its tensors. On a GPU it is launched, and counted into `counters` (or not, if
// null).
Counts run_plan(const std::string& who, const Plan& plan, const at::Tensor& out, const at::Tensor& grad,
                const std::optional<at::Tensor>& mask, double scale, int64_t* counters);

}  // namespace tlfast
