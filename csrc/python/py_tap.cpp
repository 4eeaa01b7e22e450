// The Python end of a tap, with the GIL held but for the firing itself.
#include "py_tap.h"

#include <ATen/SavedTensorHooks.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <algorithm>

#include "autograd/plain.h"
#include "kernel/errors.h"
#include "py_callable.h"

namespace py = pybind11;

namespace tlfast {

Unshared unshared_in_hook;

namespace {

py::object from_outputs(const char* name) { return py::module_::import("tlfast.backends.outputs").attr(name); }

// Python makes the errors that look closely at an output: they are said the same way by both backends.
[[noreturn]] void throw_python(const py::object& error) {
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
  throw py::error_already_set();
}

// What a hook is called with, for the call of a hook may come from anywhere.
void check_arguments(PyObject* args, PyObject* kwargs, Py_ssize_t n, const char* rule) {
  const Py_ssize_t given = PyTuple_GET_SIZE(args), named = kwargs ? PyDict_GET_SIZE(kwargs) : 0;
  TORCH_CHECK_TYPE(given == n && !named,
                   broken_rule("capture", "a hook", rule, c10::str(given, " arguments and ", named, " by name"),
                               "Leave the call to the module."));
}

// How many hooks were ever registered anywhere: their ids are counted up in one place.
long long hooks_registered() {
  static PyObject* const handle_type =
      py::object(py::module_::import("torch.utils.hooks").attr("RemovableHandle")).release().ptr();
  static PyObject* const name = PyUnicode_InternFromString("next_id");
  return PyLong_AsLongLong(py::reinterpret_steal<py::object>(PyObject_GetAttr(handle_type, name)).ptr());
}

// hook(module, args)
PyObject* call_pre_hook(PyObject* hook, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    check_arguments(args, kwargs, 2, "be called with (module, args)");
    PyTap& tap = tap_of(hook);
    const long long registered = hooks_registered();
    if (tap.hooks_seen != registered) {
      py::handle(hook).attr("take_place")(py::handle(PyTuple_GET_ITEM(args, 0)));
      tap.hooks_seen = registered;
    }
    tap.tap->forward_pre();
    return py::object(py::none());
  });
}

// hook(module, args, output), or (module, args, kwargs, output) where the tap reads what is given by name, too
PyObject* call_forward_hook(PyObject* hook, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    PyTap& tap = tap_of(hook);
    if (tap.tap->keeper->reads_inputs()) {
      check_arguments(args, kwargs, 4, "be called with (module, args, kwargs, output)");
      return tap.forward(PyTuple_GET_ITEM(args, 3), PyTuple_GET_ITEM(args, 1), PyTuple_GET_ITEM(args, 2));
    }
    check_arguments(args, kwargs, 3, "be called with (module, args, output)");
    // Where a cached gradient may be one that a full backward hook finds at the output, Python looks: see CacheHook.
    if (tap.tap->backwards->anchor.defined() && !passed_on(PyTuple_GET_ITEM(args, 1), PyTuple_GET_ITEM(args, 2)))
      return py::object(py::handle(hook).attr("__call__")(*py::handle(args)));
    return tap.forward(PyTuple_GET_ITEM(args, 2));
  });
}

}  // namespace

bool passed_on(PyObject* inputs, PyObject* output) {
  return PyTuple_Check(inputs) && PyTuple_GET_SIZE(inputs) == 1 && PyTuple_GET_ITEM(inputs, 0) == output &&
         THPVariable_Check(output);
}

PyTap& tap_of(PyObject* hook) {
  static PyObject* const name = PyUnicode_InternFromString("tap");
  const auto tap = py::reinterpret_steal<py::object>(PyObject_GetAttr(hook, name));
  if (!tap) throw py::error_already_set();
  py::detail::make_caster<PyTap> native;
  TORCH_CHECK_TYPE(native.load(tap, /*convert=*/false) && !tap.is_none(),
                   broken_rule("capture", "a hook's tap", "be a native one", type_name(tap), "Leave it as it was."));
  return py::detail::cast_op<PyTap&>(native);
}

at::Tensor detached(const py::handle& output) {
  if (THPVariable_CheckExact(output.ptr())) return alias_of(THPVariable_Unpack(output.ptr()));
  return from_outputs("alias")(output).cast<at::Tensor>();
}

std::shared_ptr<SinkKeeper> sink_keeper(const py::object& sink, const std::string& reduce, std::vector<int64_t> dims) {
  if (!THPVariable_Check(sink.ptr())) {
    TORCH_CHECK_TYPE(PyCallable_Check(sink.ptr()), broken_rule("attach", "sink", "be a tensor or callable",
                                                               type_name(sink), "Pass a function of the gradient."));
    return std::make_shared<SinkKeeper>(sink_of(sink));
  }
  check_destination("attach", "sink", THPVariable_Unpack(sink.ptr()));
  return std::make_shared<SinkKeeper>([out = THPVariable_Unpack(sink.ptr()), reduction = parse_reduction(reduce),
                                       dims = std::move(dims)](const at::Tensor& grad) {
    run_plan("attach", make_plan("attach", out, grad, reduction, dims, {}), out, grad, {}, 1.0, nullptr);
  });
}

void PyTap::set_convert(const py::object& convert, const py::object& see) {
  tap->convert = change_of(convert);
  tap->see = see_of(see);
}

void PyTap::set_side(const std::string& side) {
  const bool known = side == "output" || side == "input";
  TORCH_CHECK_VALUE(known,
                    broken_rule("capture", "side", "be output or input", "'" + side + "'", "Check the spelling."));
  tap->side = side == "input" ? kInput : kOutput;
}

PyTap::PyTap(std::shared_ptr<Backwards> backwards, const std::string& name, std::shared_ptr<Keeper> keeper,
             py::object output)
    : tap(Tap::make(std::move(backwards), name, std::move(keeper))), output(std::move(output)) {}

void check_ours_to_change(const char* who, const py::handle& type) {
  auto* const checked = reinterpret_cast<PyTypeObject*>(type.ptr());
  const bool ours_to_change = PyType_HasFeature(checked, Py_TPFLAGS_HEAPTYPE) && checked->tp_call;
  TORCH_CHECK_TYPE(ours_to_change, broken_rule(who, "a hook", "be a class with a __call__",
                                               py::str(type).cast<std::string>(), "Pass one written in Python."));
}

void PyTap::call_natively(const py::type& pre_hook, const py::type& forward_hook) {
  for (const py::handle hook : {pre_hook, forward_hook}) check_ours_to_change("call_natively", hook);
  // The interpreter calls an object through its type's tp_call, Dynamo traces what it finds under `__call__`: so eager
  // code runs natively, and compiled code sees the Python of these classes.
  reinterpret_cast<PyTypeObject*>(pre_hook.ptr())->tp_call = call_pre_hook;
  reinterpret_cast<PyTypeObject*>(forward_hook.ptr())->tp_call = call_forward_hook;
}

// The output tensor if it can have a gradient; an error, or undefined, where it can't.
at::Tensor PyTap::checked(const py::handle& tensor, const py::handle& given) const {
  const std::string& who = tap->point->who;
  if (!THPVariable_Check(tensor.ptr())) throw_python(from_outputs("no_tensor")(who, tap->side, given, output));
  const at::Tensor& found = THPVariable_Unpack(tensor.ptr());
  check_output(who, tap->side, found);
  if (found.requires_grad()) return found;
  if (!tap->backwards->missing_is_nan)
    throw_python(py::module_::import("tlfast.backends.no_graph").attr("no_graph")(who, tap->side, given, output));
  return {};
}

// A cache keeps the output, too, also where no gradient can reach it. Its one hook counts the call as well.
py::object PyTap::forward_cached(const py::handle& given) {
  if (!tap->backwards->runs_here()) return py::none();
  tap->forward_pre();
  PyObject* found = given.ptr();
  if (PyTuple_Check(found) && PyTuple_GET_SIZE(found)) found = PyTuple_GET_ITEM(found, 0);
  if (!THPVariable_Check(found)) {
    if (given.is_none()) tap->keep_output({});
    return py::none();
  }
  if (!tap->backwards->active) return py::none();
  tap->keep_output(detached(found));
  if (!tap->backwards->anchor.defined() || !at::GradMode::is_enabled() || !checked(found, given).defined())
    return py::none();
  const py::object through = behind(found, {});
  return found == given.ptr() ? through : from_outputs("replace_output")(given, 0, through);
}

// Whether hooks on saved tensors hear of what a call keeps: Python knows the checkpoints.
bool PyTap::heard(bool keeps) {
  if (!keeps || !at::SavedTensorDefaultHooks::get_hooks()) return true;
  if (!heard_) heard_ = py::module_::import("tlfast.backends.checkpoints").attr("Heard")();
  return heard_.attr("hears")(tap->entered()).cast<bool>();
}

// The output behind an identity node, whose call keeps what the tap reads of the input.
py::object PyTap::behind(const py::handle& output, const py::handle& input) {
  const at::Tensor through = detached(output);
  std::vector<at::Tensor> kept;
  if (input) {
    const at::Tensor& given = THPVariable_Unpack(input.ptr());
    const py::gil_scoped_release release;
    kept = tap->keep_of_input(given);
  }
  const bool keeps = tap->keeper->reads_outputs() || !kept.empty();
  tap->attach_behind(THPVariable_Unpack(output.ptr()), through, kept, heard(keeps));
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(through));
}

py::object PyTap::forward(const py::handle& given, const py::handle& inputs, const py::handle& named,
                          Unshared& unshared) {
  if (tap->keeper->keeps_outputs()) return forward_cached(given);
  if (!tap->backwards->active || !at::GradMode::is_enabled()) return py::none();
  py::object input;
  if (tap->keeper->reads_inputs())
    input = from_outputs("the_input")(tap->point->who, inputs ? inputs : py::tuple(), named ? named : py::dict());
  if (THPVariable_Check(given.ptr())) {
    const at::Tensor& tensor = THPVariable_Unpack(given.ptr());
    const References references = References::of(given.ptr(), tensor);
    if (learning_) {
      unshared.learn(references);
      return py::none();
    }
    const References* const most = unshared.most();
    // A node that the output brought keeps nothing of ours.
    const bool own =
        most && !tap->keeper->reads_outputs() && !input && tensor.requires_grad() && references.within(*most);
    const at::Tensor checked_tensor = checked(given, given);
    if (!checked_tensor.defined() || (own && tap->attach_to_node(tensor))) return py::none();
    return behind(given, input);
  }
  if (PyTuple_CheckExact(given.ptr())) {
    const Py_ssize_t index = index_in(given);
    if (index < 0) return forward_slowly(given, input);
    if (!checked(PyTuple_GET_ITEM(given.ptr(), index), given).defined()) return py::none();
    if (!others_noted_) note_others(given, py::int_(index));
    const py::object through = behind(PyTuple_GET_ITEM(given.ptr(), index), input);
    const Py_ssize_t n = PyTuple_GET_SIZE(given.ptr());
    auto replaced = py::reinterpret_steal<py::object>(PyTuple_New(n));
    for (Py_ssize_t i = 0; i < n; ++i)
      PyTuple_SET_ITEM(replaced.ptr(), i,
                       py::handle(i == index ? through.ptr() : PyTuple_GET_ITEM(given.ptr(), i)).inc_ref().ptr());
    return replaced;
  }
  return forward_slowly(given, input);
}

// Where in a tuple the tensor is, or -1 where Python is to find it: the rules are those of tlfast.backends.outputs.
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
py::object PyTap::forward_slowly(const py::handle& given, const py::handle& input) {
  const py::tuple found = from_outputs("select_output")(given, output);
  if (!checked(found[0], given).defined()) return py::none();
  if (!others_noted_) note_others(given, found[1]);
  return from_outputs("replace_output")(given, found[1], behind(found[0], input));
}

Py_ssize_t PyTap::place_for_full(const py::handle& given) {
  // PyTorch makes such an output anew of its items, which no other kind of tuple takes one by one.
  const bool known = THPVariable_Check(given.ptr()) || PyTuple_CheckExact(given.ptr()) ||
                     (PyTuple_Check(given.ptr()) && py::hasattr(given, "_make"));
  if (!known)
    TORCH_CHECK_TYPE(false, broken_rule(tap->point->who, "the output", "be a tensor or a tuple with attach=\"full\"",
                                        type_name(given), "Use attach=\"tensor\"."));
  if (!tap->backwards->active) return -1;
  if (THPVariable_Check(given.ptr())) return checked(given, given).defined() ? 0 : -1;
  const py::tuple found = from_outputs("select_output")(given, output);
  if (!checked(found[0], given).defined()) return -1;
  if (!others_noted_) note_others(given, found[1]);
  const Py_ssize_t place = found[1].cast<Py_ssize_t>();
  return place < 0 ? place + PyTuple_GET_SIZE(given.ptr()) : place;
}

void PyTap::check_full(const py::handle& given) {
  full_place_ = place_for_full(given);
  if (full_place_ >= 0) tap->called_with_full_hook();
}

void PyTap::note_others(const py::handle& given, const py::handle& key) {
  others_noted_ = true;
  tap->backwards->note_others(*tap->point, from_outputs("other_outputs")(given, key).cast<std::string>());
}

void PyTap::full(const py::tuple& grad_output) const {
  if (!tap->backwards->active) return;
  const py::object grad = grad_output[size_t(std::max<Py_ssize_t>(full_place_, 0))];
  if (!THPVariable_Check(grad.ptr())) return;
  const at::Tensor tensor = THPVariable_Unpack(grad.ptr());
  const py::gil_scoped_release release;
  tap->fire_of_full_hook(tensor);
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
