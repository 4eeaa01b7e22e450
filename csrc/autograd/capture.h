// The fused ops: a gradient in, or its product with another tensor, reduced, cast and copied into preallocated memory.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>

#include "kernel/capture_cpu.h"
#include "streams.h"

namespace tlfast {

// The dtype in which gradients of this dtype are added up.
inline at::ScalarType accumulator(at::ScalarType dtype) { return dtype == at::kDouble ? at::kDouble : at::kFloat; }

// As the kernels call it, if they have it.
std::optional<Dtype> dtype_of(at::ScalarType dtype);

Reduction parse_reduction(const std::string& name);

// `dims` as sorted, non-negative numbers; an error where one is out of range or named twice.
std::vector<int64_t> normal_dims(const std::string& who, at::IntArrayRef dims, int64_t n_dims);

// The shape that is left when the (normal) dims are reduced away.
std::vector<int64_t> reduced_shape(at::IntArrayRef shape, at::IntArrayRef dims);

// What a write on a GPU takes beside its operands; each may be null.
struct OnDevice {
  int64_t* cursor = nullptr;    // where on the device it is read how many rows lie before those of this write,
  int64_t row_elements = 0;     // and how far it is from one row to the next
  int64_t* counters = nullptr;  // kCounters numbers that are added to
  at::Tensor scratch = {};      // of `Plan::scratch`
};

// One call's geometry and types, checked: it fits every tensor of the same sizes, strides and dtypes.
struct Plan {
  View view;
  Reduction reduction;
  Dtypes dtypes;
  bool empty;  // nothing is written

  // On the CPU.
  Counts run(const Operands& with) const;

  // On a GPU, launched on a stream: every write of ours is set up here.
  void launch(const std::string& who, const c10::Stream& stream, const Operands& with, const OnDevice& there) const;

  // Memory for the parts of a reduction that is split on a GPU, undefined where it isn't.
  at::Tensor scratch(const at::Tensor& like) const;
};

// Check everything, in the name of `who`, of plain tensors. `over` is ignored by Reduction::none. Where there is a
// `ref`, of the gradient's sizes, the gradient is multiplied with it.
Plan make_plan(const std::string& who, const at::Tensor& out, const at::Tensor& grad, Reduction reduction,
               at::IntArrayRef over, const std::optional<at::Tensor>& mask,
               const std::optional<at::Tensor>& ref = std::nullopt);

// An error for a reduction of which there is no form for products.
void check_reduces_products(const std::string& who, Reduction reduction);

// An error unless a mask has the leading sizes of a gradient, and lies beside it.
void check_mask(const std::string& who, const at::Tensor& mask, const at::Tensor& grad);

// Run a plan once, on the device of its tensors. On a GPU it is launched, and counted into `counters` (or not, if
// null).
Counts run_plan(const std::string& who, const Plan& plan, const at::Tensor& out, const at::Tensor& grad,
                const std::optional<at::Tensor>& mask, double scale, int64_t* counters,
                const std::optional<at::Tensor>& ref = std::nullopt);

}  // namespace tlfast
