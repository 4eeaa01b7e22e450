// Short ways to what a Python object has.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace tlfast {

// What a call of the C API returned; its error is thrown.
inline pybind11::object owned(PyObject* returned) {
  if (!returned) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(returned);
}

// A name, as the interpreter keeps it.
inline pybind11::str interned(const char* name) {
  return pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(name));
}

// The `__dict__` of an object.
inline pybind11::dict dict_of(const pybind11::handle& object) {
  return owned(PyObject_GenericGetDict(object.ptr(), nullptr));
}

// What a dictionary has under a name, or null.
inline PyObject* item(const pybind11::dict& dict, const pybind11::str& name) {
  PyObject* const found = PyDict_GetItemWithError(dict.ptr(), name.ptr());
  if (!found && PyErr_Occurred()) throw pybind11::error_already_set();
  return found;
}

// What a weak reference leads to, or None.
inline pybind11::object led_to(const pybind11::weakref& reference) {
  return pybind11::reinterpret_borrow<pybind11::object>(PyWeakref_GetObject(reference.ptr()));
}

}  // namespace tlfast
