// What a call into Python returned; an error keeps its Python type on the way through autograd's engine.
#pragma once

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

namespace tlfast {

// The GIL must be held.
inline pybind11::object result_of(PyObject* returned) {
  if (!returned) {
    python_error error;
    error.persist();
    throw error;
  }
  return pybind11::reinterpret_steal<pybind11::object>(returned);
}

}  // namespace tlfast
