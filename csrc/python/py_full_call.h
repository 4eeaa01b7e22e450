// What the nodes of full backward hooks call in a backward: Python's hooks, and the taps among them.
#pragma once

#include <c10/util/SmallVector.h>
#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "autograd/full_call.h"
#include "autograd/tap.h"

namespace tlfast {

using Places = c10::SmallVector<Py_ssize_t, 4>;  // in a tuple

// Whether a hook is of the class of a capture's own hooks, which is said once.
bool is_ours(PyObject* hook);
void ours_are(PyTypeObject* type);

// The hooks of one call of a module. What is public is set in its forward, and read in its backward.
class PyFullCall final : public FullCall {
 public:
  // The two hooks are lists, as PyTorch makes them for this call alone.
  PyFullCall(PyObject* module, PyObject* hooks, PyObject* pre_hooks);
  ~PyFullCall() override;

  void at_outputs(torch::autograd::variable_list& grads,
                  c10::function_ref<torch::autograd::variable_list()> filled) override;
  void at_inputs(torch::autograd::variable_list& grads) override;

  // A tap among the hooks, and the call of it that this one is.
  struct Reader {
    Reader(pybind11::object hook, std::shared_ptr<Tap> tap, Py_ssize_t place, size_t number)
        : hook(std::move(hook)), place(place), number(number), call(std::make_unique<Call>(std::move(tap))) {}
    void fire(const at::Tensor& grad) const {
      if (grad.defined()) call->tap->fire(*call, grad);
    }
    pybind11::object hook;
    Py_ssize_t place;  // of its tensor in the output,
    size_t number;     // and among the tensors of the output
    std::unique_ptr<Call> call;
  };

  const pybind11::object& module() const { return module_; }
  const pybind11::object& hooks() const { return hooks_; }
  const pybind11::object& pre_hooks() const { return pre_hooks_; }

  bool has_inputs = false;                         // whether there is a node before the inputs
  bool reads_python = false, has_readers = false;  // whether one of the hooks is Python's, or a tap's
  Py_ssize_t n_inputs = -1, n_outputs = -1;
  Places input_places, output_places;  // of the tensors
  std::vector<Reader> readers;

 private:
  // Call the hooks in their order: the taps, and each of Python's by `call_hook(hook)`.
  template <class CallHook>
  void each_hook(const pybind11::object& grad_output, CallHook call_hook) const;

  pybind11::object module_, hooks_, pre_hooks_;
  const Py_ssize_t n_pre_hooks_;
  std::mutex mutex_;  // a graph may be run by several threads
  // The gradients at the outputs, until those at the inputs are there; or what pre-hooks have made of them.
  std::optional<torch::autograd::variable_list> came_;
  pybind11::object grad_output_;
};

}  // namespace tlfast
