// The Python end of a tap, with the GIL held but for the firing itself.
#include "py_tap.h"

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include "errors.h"
#include "py_callable.h"

namespace py = pybind11;

namespace tlfast {
namespace {

// How often an output, its memory and its node are referenced while a forward hook looks at a plain output that nobody
// else holds: by the running frames alone. It depends on Python's and torch's versions, so it is learnt, from a module
// made for it.
struct References {
  Py_ssize_t object = 0;
  size_t tensor = 0, storage = 0, node = 0;

  static References of(PyObject* object, const at::Tensor& tensor) {
    const auto& node = tensor.grad_fn();
    const size_t storage = tensor.has_storage() ? tensor.storage().use_count() : ~size_t(0);
    return {Py_REFCNT(object), size_t(tensor.use_count()), storage, node ? size_t(node.use_count()) : 0};
  }
  bool within(const References& most) const {
    return object <= most.object && tensor <= most.tensor && storage <= most.storage && node <= most.node;
  }
};
References unshared;
bool learning = false;

py::object from_outputs(const char* name) { return py::module_::import("tlfast.outputs").attr(name); }

PyTap& tap_of(PyObject* hook) {
  static PyObject* const name = PyUnicode_InternFromString("tap");
  return py::reinterpret_steal<py::object>(PyObject_GetAttr(hook, name)).cast<PyTap&>();
}

// How many hooks were ever registered anywhere: their ids are counted up in one place.
long long hooks_registered() {
  static PyObject* const handle_type =
      py::object(py::module_::import("torch.utils.hooks").attr("RemovableHandle")).release().ptr();
  static PyObject* const name = PyUnicode_InternFromString("next_id");
  return PyLong_AsLongLong(py::reinterpret_steal<py::object>(PyObject_GetAttr(handle_type, name)).ptr());
}

template <class Body>
PyObject* guarded(Body body) {
  try {
    return body().release().ptr();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (...) {
    torch::translate_exception_to_python(std::current_exception());
  }
  return nullptr;
}

// hook(module, args)
PyObject* call_pre_hook(PyObject* hook, PyObject* args, PyObject*) {
  return guarded([&] {
    PyTap& tap = tap_of(hook);
    const long long registered = hooks_registered();
    if (tap.hooks_seen != registered) {
      py::handle(hook).attr("move_last")(py::handle(PyTuple_GetItem(args, 0)));
      tap.hooks_seen = registered;
    }
    tap.tap->forward_pre();
    return py::object(py::none());
  });
}

// hook(module, args, output)
PyObject* call_forward_hook(PyObject* hook, PyObject* args, PyObject*) {
  return guarded([&] { return tap_of(hook).forward(PyTuple_GetItem(args, 2)); });
}

}  // namespace

std::unique_ptr<PyTap> PyTap::to_sink(std::shared_ptr<Step> step, const std::string& name, const py::object& sink,
                                      const std::string& reduce, std::vector<int64_t> dims, const py::object& output) {
  auto tap = Tap::make(std::move(step), name, {}, Calls::last);
  if (THPVariable_Check(sink.ptr())) {
    tap->sink = [out = THPVariable_Unpack(sink.ptr()), reduction = parse_reduction(reduce),
                 dims = std::move(dims)](const at::Tensor& grad) {
      run_plan("attach", make_plan("attach", out, grad, reduction, dims, {}), out, grad, {}, 1.0, nullptr);
    };
  } else {
    tap->sink = sink_of(sink);
  }
  return std::make_unique<PyTap>(std::move(tap), output, py::list());
}

std::unique_ptr<PyTap> PyTap::to_cache(std::shared_ptr<Step> step, const std::string& name,
                                       std::shared_ptr<TensorCache> cache, const py::object& select,
                                       const std::string& calls, const std::optional<at::Tensor>& anchor) {
  auto tap = Tap::make(std::move(step), name, {}, parse_calls(calls));
  if (anchor) tap->anchor = *anchor;
  tap->keep_in(std::move(cache), change_of(select));
  return std::make_unique<PyTap>(std::move(tap), py::none(), py::list());
}

void PyTap::set_convert(const py::object& convert) { tap->convert = change_of(convert); }

PyTap::PyTap(std::shared_ptr<Tap> tap, py::object output, py::list rings)
    : tap(std::move(tap)), output(std::move(output)), rings(std::move(rings)) {}

void PyTap::learn_references(bool learn) { learning = learn; }

void PyTap::call_natively(const py::type& pre_hook, const py::type& forward_hook) {
  // The interpreter calls an object through its type's tp_call, Dynamo traces what it finds under `__call__`: so eager
  // code runs natively, and compiled code sees the Python of these classes.
  reinterpret_cast<PyTypeObject*>(pre_hook.ptr())->tp_call = call_pre_hook;
  reinterpret_cast<PyTypeObject*>(forward_hook.ptr())->tp_call = call_forward_hook;
}

// The output tensor if it can have a gradient; an error, or undefined, where it can't.
at::Tensor PyTap::checked(const py::handle& tensor, const py::handle& given) const {
  const std::string& who = tap->point->who;
  if (!THPVariable_Check(tensor.ptr())) {
    const std::string rule = output.is_none() ? "hold a tensor" : "hold " + std::string(py::repr(output));
    TORCH_CHECK_TYPE(false,
                     broken_rule(who, "the output", rule, type_name(given), "Choose it with output=<index or key>."));
  }
  const at::Tensor& found = THPVariable_Unpack(tensor.ptr());
  TORCH_CHECK(!found.unsafeGetTensorImpl()->key_set().has_any(c10::functorch_transforms_ks),
              broken_rule(who, "the output", "be a tensor with memory of its own", "one inside a torch.func transform",
                          "Use loss.backward() or torch.autograd.grad instead."));
  if (found.requires_grad()) return found;
  TORCH_CHECK(tap->step->missing_is_nan,
              broken_rule(who, "the output", "require grad", "a tensor without a graph: no gradient can reach it",
                          "Use freeze(model) to start the graph at the embedding, or pass missing=\"nan\"."));
  return {};
}

// A cache keeps the output, too, also where no gradient can reach it. Its one hook counts the call as well.
py::object PyTap::forward_cached(const py::handle& given) {
  tap->forward_pre();
  PyObject* found = given.ptr();
  if (PyTuple_Check(found) && PyTuple_GET_SIZE(found)) found = PyTuple_GET_ITEM(found, 0);
  if (!THPVariable_Check(found)) {
    if (given.is_none()) tap->cache_output({});
    return py::none();
  }
  const at::Tensor& tensor = THPVariable_Unpack(found);
  tap->cache_output(tensor);
  if (!tap->anchor.defined() || !tap->step->active || !at::GradMode::is_enabled()) return py::none();
  if (!checked(found, given).defined()) return py::none();
  auto through = py::reinterpret_steal<py::object>(THPVariable_Wrap(tap->attach_behind(tensor)));
  return found == given.ptr() ? through : from_outputs("replace_output")(given, 0, through);
}

py::object PyTap::forward(const py::handle& given) {
  if (tap->cache) return forward_cached(given);
  if (!tap->step->active || !at::GradMode::is_enabled()) return py::none();
  if (THPVariable_Check(given.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(given.ptr());
    const References references = References::of(given.ptr(), tensor);
    if (learning) {
      unshared = references;
      return py::none();
    }
    const bool own = tensor.requires_grad() && references.within(unshared);
    const at::Tensor checked_tensor = checked(given, given);
    if (!checked_tensor.defined() || (own && tap->attach_to_node(tensor))) return py::none();
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(tap->attach_behind(tensor)));
  }
  if (PyTuple_CheckExact(given.ptr())) {
    const Py_ssize_t index = index_in(given);
    if (index < 0) return forward_slowly(given);
    const at::Tensor tensor = checked(PyTuple_GET_ITEM(given.ptr(), index), given);
    if (!tensor.defined()) return py::none();
    const Py_ssize_t n = PyTuple_GET_SIZE(given.ptr());
    auto replaced = py::reinterpret_steal<py::object>(PyTuple_New(n));
    for (Py_ssize_t i = 0; i < n; ++i)
      PyTuple_SET_ITEM(replaced.ptr(), i,
                       i == index ? THPVariable_Wrap(tap->attach_behind(tensor))
                                  : py::handle(PyTuple_GET_ITEM(given.ptr(), i)).inc_ref().ptr());
    return replaced;
  }
  return forward_slowly(given);
}

// Where in a tuple the tensor is, or -1 where Python is to find it: the rules are those of tlfast.outputs.
Py_ssize_t PyTap::index_in(const py::handle& given) const {
  const Py_ssize_t n = PyTuple_GET_SIZE(given.ptr());
  if (PyLong_CheckExact(output.ptr())) {
    const Py_ssize_t index = output.cast<Py_ssize_t>();
    return index >= 0 && index < n && THPVariable_Check(PyTuple_GET_ITEM(given.ptr(), index)) ? index : -1;
  }
  if (!output.is_none()) return -1;
  for (Py_ssize_t i = 0; i < n; ++i) {
    PyObject* item = PyTuple_GET_ITEM(given.ptr(), i);
    if (THPVariable_Check(item) && at::isFloatingType(THPVariable_Unpack(item).scalar_type())) return i;
  }
  return -1;
}

// Outputs of any other kind: mappings, lists, named tuples.
py::object PyTap::forward_slowly(const py::handle& given) const {
  const py::tuple found = from_outputs("select_output")(given, output);
  const at::Tensor tensor = checked(found[0], given);
  if (!tensor.defined()) return py::none();
  const auto through = py::reinterpret_steal<py::object>(THPVariable_Wrap(tap->attach_behind(tensor)));
  return from_outputs("replace_output")(given, found[1], through);
}

void PyTap::check_full(const py::handle& given) {
  const bool known = THPVariable_Check(given.ptr()) || PyTuple_Check(given.ptr());
  if (!known)
    TORCH_CHECK_TYPE(false, broken_rule(tap->point->who, "the output", "be a tensor or a tuple with attach=\"full\"",
                                        type_name(given), "Use attach=\"tensor\"."));
  if (!tap->step->active) return;
  const py::tuple found = from_outputs("select_output")(given, output);
  checked(found[0], given);
  full_index_ = py::isinstance<py::int_>(found[1]) ? found[1].cast<Py_ssize_t>() : 0;
}

void PyTap::full(const py::tuple& grad_output) const {
  if (!tap->step->active) return;
  const Py_ssize_t n = Py_ssize_t(grad_output.size());
  const py::object grad = grad_output[size_t(full_index_ < 0 ? full_index_ + n : full_index_)];
  if (!THPVariable_Check(grad.ptr())) return;
  const at::Tensor tensor = THPVariable_Unpack(grad.ptr());
  const py::gil_scoped_release release;
  tap->fire(tensor);
}

py::tuple waiting(const at::Tensor& value) {
  const Waiting found = waiting_in(value);
  py::list leaves, nodes;
  for (const auto& leaf : found.leaves) leaves.append(py::reinterpret_steal<py::object>(THPVariable_Wrap(leaf)));
  for (const auto& node : found.nodes)
    nodes.append(py::reinterpret_steal<py::object>(torch::autograd::functionToPyObject(node)));
  return py::make_tuple(leaves, nodes);
}

}  // namespace tlfast
