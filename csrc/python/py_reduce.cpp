// The fused op for small tensors: from Python's arguments to the kernel with nothing between.
#include "py_reduce.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <optional>

#include "autograd/capture.h"
#include "autograd/plain.h"

namespace py = pybind11;

namespace tlfast {
namespace {

constexpr int64_t kHoldsGil = 4096;  // elements that take less time than to let go of the GIL

// Whether somebody wants to see each op, or to take it over.
bool watched() {
  return at::impl::torch_function_mode_enabled() || c10::impl::TorchDispatchModeTLS::any_modes_set() ||
         torch::jit::tracer::isTracing();
}

// The tensor, if it is plain memory of the CPU and in no graph.
const at::Tensor* plain_tensor(PyObject* given) {
  if (!THPVariable_CheckExact(given)) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(given);
  return tensor.is_cpu() && is_plain(tensor) && !tensor.requires_grad() ? &tensor : nullptr;
}

std::optional<Reduction> reduction_of(PyObject* name) {
  if (!PyUnicode_CheckExact(name)) return std::nullopt;
  for (size_t i = 0; i < kReductionNames.size(); ++i)
    if (PyUnicode_CompareWithASCIIString(name, kReductionNames[i]) == 0) return Reduction(i);
  return std::nullopt;
}

std::optional<int64_t> dimension_of(PyObject* over) {
  if (PyLong_CheckExact(over)) {
    int overflow = 0;
    const long long dim = PyLong_AsLongLongAndOverflow(over, &overflow);
    if (!overflow) return dim;
  } else if (PyUnicode_CheckExact(over)) {
    if (PyUnicode_CompareWithASCIIString(over, "pos") == 0) return 1;
    if (PyUnicode_CompareWithASCIIString(over, "batch") == 0) return 0;
  }
  return std::nullopt;
}

// Whether it is done.
bool at_once(PyObject* const* args) {
  if (watched()) return false;
  const at::Tensor *out = plain_tensor(args[0]), *grad = plain_tensor(args[1]);
  const auto reduction = reduction_of(args[2]);
  const auto dim = dimension_of(args[3]);
  std::optional<at::Tensor> mask;
  if (args[4] != Py_None) {
    const at::Tensor* given = plain_tensor(args[4]);
    if (!given) return false;
    mask = *given;
  }
  if (!out || !grad || !reduction || !dim || !PyFloat_CheckExact(args[5])) return false;
  const Plan plan = make_plan("capture", *out, *grad, *reduction, *dim, mask);
  std::optional<py::gil_scoped_release> released;
  if (grad->numel() > kHoldsGil) released.emplace();
  plan.run({.grad = grad->const_data_ptr(),
            .ref = nullptr,
            .mask = mask ? mask->const_data_ptr() : nullptr,
            .out = out->mutable_data_ptr(),
            .scale = PyFloat_AS_DOUBLE(args[5])});
  return true;
}

PyObject* called(PyObject*, PyObject* const* args, Py_ssize_t n) {
  if (n != 6) {
    PyErr_Format(PyExc_TypeError, "reduce_at_once: arguments must be 6, got %zd. Call tlfast.reduce_into.", n);
    return nullptr;
  }
  try {
    return PyBool_FromLong(at_once(args));
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

}  // namespace

PyMethodDef reduce_at_once = {"reduce_at_once", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(called)),
                              METH_FASTCALL, nullptr};

}  // namespace tlfast
