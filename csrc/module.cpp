// The native module tlfast._C: a table of contents.
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "errors.h"
#include "tap.h"

namespace py = pybind11;
using namespace tlfast;

namespace tlfast {
void register_tap(const std::shared_ptr<Tap>& tap);
}

namespace {

std::optional<at::ScalarType> dtype_of(const py::object& dtype) {
  if (dtype.is_none()) return std::nullopt;
  return reinterpret_cast<THPDtype*>(dtype.ptr())->scalar_type;
}

Calls calls_of(const std::string& name) {
  return name == "sum" ? Calls::sum : name == "last" ? Calls::last : name == "stack" ? Calls::stack : Calls::raise;
}

// The Python end of a tap: it also knows which of several outputs is meant.
struct PyTap {
  std::shared_ptr<Tap> tap;
  py::object output;
  py::list rings;

  // (tensor or None, key) of the output that is meant; slow, for outputs that aren't tensors.
  std::pair<py::object, py::object> select(const py::handle& given) const {
    static py::object* select_output = new py::object(py::module_::import("tlfast.taps").attr("select_output"));
    const py::tuple found = (*select_output)(given, output);
    return {found[0], found[1]};
  }

  // The output tensor if it can have a gradient; an error, or undefined, where it can't.
  at::Tensor checked(const py::handle& tensor, const py::handle& given) const {
    if (!THPVariable_Check(tensor.ptr())) {
      const std::string rule = output.is_none() ? "hold a tensor" : "hold " + std::string(py::repr(output));
      const std::string type = py::str(py::type::of(given).attr("__name__"));
      TORCH_CHECK_TYPE(false,
                       broken_rule(tap->point->who, "the output", rule, type, "Choose it with output=<index or key>."));
    }
    const at::Tensor& found = THPVariable_Unpack(tensor.ptr());
    if (found.requires_grad()) return found;
    TORCH_CHECK(
        tap->step->missing_is_nan,
        broken_rule(tap->point->who, "the output", "require grad", "a tensor without a graph: no gradient can reach it",
                    "Use freeze(model) to start the graph at the embedding, or pass missing=\"nan\"."));
    return {};
  }

  py::object forward(const py::handle& inputs, const py::handle& given) const {
    if (!tap->step->active || !at::GradMode::is_enabled()) return py::none();
    py::object tensor = py::reinterpret_borrow<py::object>(given), key = py::none();
    if (!THPVariable_Check(given.ptr())) std::tie(tensor, key) = select(given);
    const at::Tensor found = checked(tensor, given);
    if (!found.defined()) return py::none();
    bool is_input = false;
    if (PyTuple_Check(inputs.ptr()))
      for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(inputs.ptr()); ++i)
        is_input |= PyTuple_GET_ITEM(inputs.ptr(), i) == tensor.ptr();
    const auto through = tap->attach(found, is_input);
    if (!through) return py::none();
    py::object wrapped = py::reinterpret_steal<py::object>(THPVariable_Wrap(*through));
    if (tensor.ptr() == given.ptr()) return wrapped;
    return py::module_::import("tlfast.taps").attr("replace_output")(given, key, wrapped);
  }

  void check_full(const py::handle& given) const {
    static py::object* mapping = new py::object(py::module_::import("collections.abc").attr("Mapping"));
    if (!THPVariable_Check(given.ptr()) && py::isinstance(given, *mapping)) {
      const std::string type = py::str(py::type::of(given).attr("__name__"));
      TORCH_CHECK_TYPE(false, broken_rule(tap->point->who, "the output", "be a tensor or a tuple with attach=\"full\"",
                                          type, "Use attach=\"tensor\"."));
    }
    if (tap->step->active)
      checked(THPVariable_Check(given.ptr()) ? py::reinterpret_borrow<py::object>(given) : select(given).first, given);
  }

  void full(const py::tuple& grad_output) const {
    if (!tap->step->active) return;
    const size_t wanted = py::isinstance<py::int_>(output) && grad_output.size() > 1 ? size_t(py::int_(output)) : 0;
    const size_t last = wanted == 0 && output.is_none() ? grad_output.size() : wanted + 1;
    for (size_t i = wanted; i < last; ++i) {
      PyObject* grad = PyTuple_GET_ITEM(grad_output.ptr(), i);
      if (THPVariable_Check(grad)) {
        const at::Tensor tensor = THPVariable_Unpack(grad);
        const py::gil_scoped_release release;
        return tap->fire(tensor);
      }
    }
  }
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native code of tlfast; tlfast.taps and tlfast.ring do the same in Python.";
  m.attr("TORCH_VERSION") = c10::str(TORCH_VERSION_MAJOR, ".", TORCH_VERSION_MINOR);
  m.def("describe", [] { return c10::str("cpu, ", cpu_features()); });

  py::class_<Ring, std::shared_ptr<Ring>>(m, "Ring")
      .def(py::init([](std::string column, const std::string& reduce, std::vector<int64_t> dims, py::object dtype,
                       int64_t capacity) {
        return std::make_shared<Ring>(std::move(column), parse_reduction(reduce), std::move(dims), dtype_of(dtype),
                                      capacity);
      }))
      .def_readonly("column", &Ring::column)
      .def_property_readonly("rows",
                             [](const Ring& ring) -> std::optional<at::Tensor> {
                               const at::Tensor rows = ring.rows();
                               return rows.defined() ? std::optional<at::Tensor>(rows) : std::nullopt;
                             })
      .def_property_readonly("n_nonfinite", [](const Ring& ring) { return ring.n_nonfinite.load(); })
      .def_property_readonly("n_saturated", [](const Ring& ring) { return ring.n_saturated.load(); });

  py::class_<Step, std::shared_ptr<Step>>(m, "Step")
      .def(py::init([](int64_t capacity, const std::string& missing) {
        return std::make_shared<Step>(capacity, missing == "nan");
      }))
      .def("set_batch", &Step::set_batch)
      .def("committed", &Step::committed)
      .def("clear", &Step::clear)
      .def("close", &Step::close)
      .def_property_readonly("n_ended", [](const Step& step) { return step.n_ended.load(); });

  py::class_<PyTap>(m, "Tap")
      .def(py::init([](std::shared_ptr<Step> step, std::string name, py::list rings, py::object output,
                       const std::string& calls) {
        auto tap = std::make_shared<Tap>(std::move(step), std::move(name),
                                         rings.cast<std::vector<std::shared_ptr<Ring>>>(), calls_of(calls));
        register_tap(tap);
        return PyTap{std::move(tap), std::move(output), std::move(rings)};
      }))
      .def("forward_pre", [](const PyTap& tap) { tap.tap->forward_pre(); })
      .def("forward", &PyTap::forward)
      .def("check_full", &PyTap::check_full)
      .def("full", &PyTap::full)
      .def_readonly("output", &PyTap::output)
      .def_readonly("rings", &PyTap::rings)
      .def_property_readonly("name", [](const PyTap& tap) { return tap.tap->point->name; })
      .def_property_readonly("number", [](const PyTap& tap) { return tap.tap->number; })
      .def_property_readonly("last_call", [](const PyTap& tap) { return tap.tap->last_call.load(); })
      .def_property_readonly_static("fire_op", [](const py::object&) {
        return py::module_::import("torch").attr("ops").attr("tlfast").attr("fire");
      });
}
