// One call of a module with full backward hooks: a node before its inputs, one behind its outputs, and what they share.
#pragma once

#include <c10/util/FunctionRef.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>
#include <vector>

namespace tlfast {

// What the two nodes tell of the gradients that reach them. Both hold it.
class FullCall {
 public:
  virtual ~FullCall() = default;

  // The gradients at the outputs, undefined where there is none; what is put in their place goes on. `filled` gives
  // them with zeros there.
  virtual void at_outputs(torch::autograd::variable_list& grads,
                          c10::function_ref<torch::autograd::variable_list()> filled) = 0;

  // The gradients at the inputs, zeros where there is none.
  virtual void at_inputs(torch::autograd::variable_list& grads) = 0;
};

// A node of such a call, not yet behind any tensor.
class FullNode {
 public:
  enum class Side { inputs, outputs };

  // The node leads to `tensors`, of which some require grad.
  FullNode(std::shared_ptr<FullCall> call, Side side, const torch::autograd::variable_list& tensors);

  // The next of the tensors: let the node be what made `through`, or, for one that requires no grad, undefined.
  void add(const at::Tensor& tensor, const at::Tensor& through);

  // Whether a tensor that the node made is still that: an operation in place makes it another.
  bool made(const at::Tensor& through) const { return through.grad_fn().get() == node_.get(); }

  // How many hold the node: this, the tensors that it made, and what was computed of them.
  size_t holders() const { return size_t(node_.use_count()); }

 private:
  decltype(torch::autograd::Edge::function) node_;
};

// Let an alias of `given` refuse to be changed in place, with PyTorch's own error: for memory that is known by another
// name as well, under which the change would have no history. The error tells apart one output of several.
void forbid_in_place(const at::Tensor& given, const at::Tensor& alias, bool of_several);

// The same for one that has its history, and keeps it.
void forbid_in_place_from_now(const at::Tensor& given, const at::Tensor& alias, bool of_several);

}  // namespace tlfast
