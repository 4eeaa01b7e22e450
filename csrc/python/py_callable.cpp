// Python callables among native code: called with the GIL, and dropped with it.
#include "py_callable.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/python_variable.h>

#include "kernel/errors.h"
#include "python_result.h"

namespace py = pybind11;

namespace tlfast {
namespace {

// A Python object that may be dropped by a thread that doesn't hold the GIL.
std::shared_ptr<py::object> held_anywhere(py::object object) {
  return {new py::object(std::move(object)), [](py::object* held) {
            const py::gil_scoped_acquire gil;
            delete held;
          }};
}

// A tensor without its history, None where it is undefined; the GIL must be held.
py::object without_history(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor.defined() ? tensor.detach() : tensor));
}

py::object call(const py::object& callable, const at::Tensor& tensor) {
  return result_of(PyObject_CallOneArg(callable.ptr(), without_history(tensor).ptr()));
}

}  // namespace

std::string type_name(const py::handle& given) { return py::str(py::type::of(given).attr("__name__")); }

Sink sink_of(py::object callable) {
  return [held = held_anywhere(std::move(callable))](const at::Tensor& grad) {
    const py::gil_scoped_acquire gil;
    call(*held, grad);
  };
}

std::function<void(const Seen&)> see_of(py::object callable) {
  if (callable.is_none()) return {};
  TORCH_CHECK_TYPE(PyCallable_Check(callable.ptr()), broken_rule("capture", "what is shown a gradient", "be callable",
                                                                 type_name(callable), "Pass a function or None."));
  return [held = held_anywhere(std::move(callable))](const Seen& seen) {
    const py::gil_scoped_acquire gil;
    py::list kept;
    if (seen.kept)
      for (const at::Tensor& tensor : *seen.kept) kept.append(without_history(tensor));
    const auto shown = py::make_tuple(without_history(seen.grad), without_history(seen.act), kept);
    result_of(PyObject_CallObject(held->ptr(), shown.ptr()));
  };
}

Change change_of(py::object callable) {
  if (callable.is_none()) return {};
  TORCH_CHECK_TYPE(PyCallable_Check(callable.ptr()), broken_rule("capture", "a conversion", "be callable",
                                                                 type_name(callable), "Pass a function or None."));
  return [held = held_anywhere(std::move(callable))](const at::Tensor& tensor) {
    const py::gil_scoped_acquire gil;
    const at::NoGradGuard no_grad;
    const py::object changed = call(*held, tensor);
    TORCH_CHECK_TYPE(THPVariable_Check(changed.ptr()),
                     broken_rule("capture", "a conversion", "return a tensor", type_name(changed), "Check it."));
    return THPVariable_Unpack(changed.ptr());
  };
}

}  // namespace tlfast
