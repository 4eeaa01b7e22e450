// What isn't plain memory: rare, so the rules and their words stand once, in tlfast/backends/plain.py.
#include "autograd/plain.h"

#include <torch/csrc/autograd/python_variable.h>

#include "python_result.h"

namespace py = pybind11;

namespace tlfast {
namespace {

// Let a function of tlfast.backends.plain look at a tensor. It may be called on a thread of the engine.
template <class... Arguments>
at::Tensor ask(const char* function, const at::Tensor& tensor, const Arguments&... arguments) {
  const py::gil_scoped_acquire gil;
  const auto given = py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
  const py::object asked = py::module_::import("tlfast.backends.plain").attr(function);
  const py::object answer = result_of(PyObject_CallObject(asked.ptr(), py::make_tuple(arguments..., given).ptr()));
  return answer.is_none() ? tensor : THPVariable_Unpack(answer.ptr());
}

}  // namespace

at::Tensor made_plain(const std::string& who, const char* argument, const at::Tensor& given) {
  return ask("plain", given, who, argument);
}

void check_destination(const std::string& who, const char* argument, const at::Tensor& given) {
  if (!is_plain(given)) ask("destination", given, who, argument);
}

void check_output(const std::string& who, const char* argument, const at::Tensor& output) {
  if (!is_plain(output)) ask("check_output", output, who, argument);
}

}  // namespace tlfast
