// The Python end of a tap: what PyTorch's module hooks call.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "autograd/tap.h"
#include "references.h"

namespace tlfast {

// An output that nobody else holds, as a forward hook sees it; taps on nodes come after it is learnt.
extern Unshared unshared_in_hook;

class PyTap {
 public:
  // `output`: which of several outputs is meant; None is the first tensor.
  PyTap(std::shared_ptr<Backwards> backwards, const std::string& name, std::shared_ptr<Keeper> keeper,
        pybind11::object output);

  // What is to be made of each gradient, and of an output that is kept, before anything else; and what is shown each
  // gradient then. Python callables or None.
  void set_convert(const pybind11::object& convert, const pybind11::object& see);

  // Of a module's "output" or "input", as errors call it.
  void set_side(const std::string& side);

  // Attach to a module's output, or inputs; returns the output to use instead, or None where it stays as it is.
  // `inputs`: the tuple of what the module was given, and `named` the mapping, for a tap that keeps something of it.
  // `unshared`: how often an output is referenced here that nobody but the caller holds.
  pybind11::object forward(const pybind11::handle& given, const pybind11::handle& inputs = {},
                           const pybind11::handle& named = {}, Unshared& unshared = unshared_in_hook);

  // Where in an output the tensor is that a full backward hook reads, or -1 where that can have no gradient; an error
  // for an output that such hooks can't take.
  Py_ssize_t place_for_full(const pybind11::handle& given);

  // The same where the hook is PyTorch's own; called before it wraps the output.
  void check_full(const pybind11::handle& given);

  // The body of a full backward hook.
  void full(const pybind11::tuple& grad_output) const;

  // Make instances of two hook classes run natively when they are called.
  static void call_natively(const pybind11::type& pre_hook, const pybind11::type& forward_hook);

  // From now on this tap attaches to nothing: `forward` learns how often an output is referenced that nobody but its
  // caller holds, for all taps. What is learnt first stays.
  void learn_references() { learning_ = true; }
  bool learning() const { return learning_; }

  const std::shared_ptr<Tap> tap;
  const pybind11::object output;
  long long hooks_seen = -1;  // how many hooks were registered when ours was last put behind the others

 private:
  at::Tensor checked(const pybind11::handle& tensor, const pybind11::handle& given) const;
  void note_others(const pybind11::handle& given, const pybind11::handle& key);
  Py_ssize_t index_in(const pybind11::handle& given) const;
  pybind11::object behind(const pybind11::handle& output, const pybind11::handle& input);
  bool heard(bool keeps);
  pybind11::object forward_slowly(const pybind11::handle& given, const pybind11::handle& input);
  pybind11::object forward_cached(const pybind11::handle& given);

  bool learning_ = false;
  bool others_noted_ = false;
  pybind11::object heard_;     // tlfast.backends.checkpoints.Heard, where hooks on saved tensors were met
  Py_ssize_t full_place_ = 0;  // where in the output the tensor was, for PyTorch's own full hook
};

// The tap of a hook written in Python.
PyTap& tap_of(PyObject* hook);

// Whether a module put out the one tensor that it was given.
bool passed_on(PyObject* inputs, PyObject* output);

// An output as torch.Tensor.detach() gives it, but of its own class and with its attributes.
at::Tensor detached(const pybind11::handle& output);

// An error unless the instances of a class may be called natively.
void check_ours_to_change(const char* who, const pybind11::handle& type);

// What a function called by the interpreter returns: a new reference, or null after an error.
template <class Body>
PyObject* guarded(Body body) {
  try {
    return body().release().ptr();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

// A keeper that hands each gradient to a sink, a tensor or a callable.
std::shared_ptr<SinkKeeper> sink_keeper(const pybind11::object& sink, const std::string& reduce,
                                        std::vector<int64_t> dims);

// (leaves, nodes) that wait for gradients of a value: see `waiting_in`.
pybind11::tuple waiting(const at::Tensor& value);

}  // namespace tlfast
