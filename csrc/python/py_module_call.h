// The call of a module on which nobody has a hook but a tap: natively, past PyTorch's own path of hooks.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include "py_tap.h"

namespace tlfast {

// It stands where a module looks first when it is called, and goes PyTorch's own way as soon as there is anything else
// than the hooks of one tap.
class ModuleCall {
 public:
  // `hook` is to be the one forward hook of the module, `before` its one forward pre-hook, or None where there is to be
  // none. `holders`: how many hold the object that stands in the module's dictionary beside that, all the time.
  ModuleCall(const pybind11::object& module, pybind11::object hook, pybind11::object before, int64_t holders);

  // What the module's `__call__` calls in place of `_call_impl`; `self` is the object that stands in its dictionary.
  pybind11::object run(PyObject* self, PyObject* args, PyObject* kwargs) const;

  // Let instances of a Python class, whose `native` is a ModuleCall, run natively when they are called.
  static void call_natively(const pybind11::type& caller);

 private:
  bool is_shared(const pybind11::handle& module, PyObject* self) const;
  bool is_ours(const pybind11::handle& module) const;
  bool is_still_ours(const pybind11::handle& module) const;
  pybind11::object with_hooks(const pybind11::handle& module, PyObject* self, PyObject* args, PyObject* kwargs) const;

  const pybind11::weakref module_;  // which has us
  const pybind11::object hook_, before_, tap_;
  PyTap& native_tap_;  // that of tap_
  const int64_t holders_;
};

}  // namespace tlfast
