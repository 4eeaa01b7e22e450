// Full backward hooks in a forward: where they go, and which calls of a module have native ones.
#include "py_full_hooks.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "kernel/errors.h"
#include "py_callable.h"
#include "py_full_call.h"
#include "py_tap.h"
#include "python_result.h"
#include "references.h"

namespace py = pybind11;

namespace tlfast {
namespace {

using torch::autograd::variable_list;

// Set once by `choose_natively`, and never dropped.
PyObject* plain_hook = nullptr;
PyObject* checked_hook = nullptr;
// Set by `choose_for`.
bool for_all = false;
PyObject* for_ids = nullptr;  // of modules, and of their classes

thread_local bool learning = false;
Unshared outputs;
// How often an input's object is referenced behind a forward that has not kept it, learnt as the above.
std::atomic<Py_ssize_t> names_of_inputs{0};

bool is_named(PyObject* object) {
  const auto id = py::reinterpret_steal<py::object>(PyLong_FromVoidPtr(object));
  return PyDict_Contains(for_ids, id.ptr()) == 1;
}

bool has_ours(PyObject* hooks) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(hooks); ++i)
    if (is_ours(PyList_GET_ITEM(hooks, i))) return true;
  return false;
}

// Whether compiled autograd is to run the backward, as far as that is known in a forward.
bool compiled_autograd_is_on() {
  static PyObject* const modules = PyImport_GetModuleDict();
  static PyObject* const name = PyUnicode_InternFromString("torch._dynamo.compiled_autograd");
  static PyObject* const flag = PyUnicode_InternFromString("compiled_autograd_enabled");
  PyObject* const module = PyDict_GetItemWithError(modules, name);
  if (!module) return false;
  const auto on = py::reinterpret_steal<py::object>(PyObject_GetAttr(module, flag));
  if (!on) PyErr_Clear();
  return on.ptr() == Py_True;
}

py::object wrapped(const at::Tensor& tensor) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor)); }

// An input that the module may change in place: as it was given, and behind the node. Both are others' to hold.
struct Renewable {
  using Weak = c10::weak_intrusive_ptr<at::TensorImpl, at::UndefinedTensorImpl>;

  Renewable(const at::Tensor& given, const at::Tensor& through, bool of_several)
      : given(given.getIntrusivePtr()),
        through(through.getIntrusivePtr()),
        history(torch::autograd::impl::gradient_edge(given)),
        of_several(of_several) {}

  Weak given, through;
  torch::autograd::Edge history;  // of what was given
  bool of_several;
  size_t readers = 0;  // how many hold the node of the history: more, once what was given has been read
};

// The Python object: made as a module is called, gone when its forward has run.
struct FullHooks {
  PyObject_HEAD std::shared_ptr<PyFullCall> call;
  std::optional<FullNode> inputs;
  std::vector<Renewable> renewable;
  size_t holders;     // of the node of the inputs, as the module begins
  PyObject* instead;  // PyTorch's own, where only that can be equal
};

void free_full_hooks(PyObject* self) {
  auto* const held = reinterpret_cast<FullHooks*>(self);
  PyTypeObject* const type = Py_TYPE(self);
  Py_XDECREF(held->instead);
  std::destroy_at(held);
  type->tp_free(self);
  Py_DECREF(type);
}

// The items of what a module was given or put out, and the tensors among them.
struct Items {
  explicit Items(PyObject* given)
      : in_tuple(PyTuple_Check(given)), given(given), n(in_tuple ? PyTuple_GET_SIZE(given) : 1) {
    for (Py_ssize_t i = 0; i < n; ++i) {
      if (!THPVariable_Check(at(i))) continue;
      tensors.push_back(THPVariable_Unpack(at(i)));
      places.push_back(i);
      n_grad += tensors.back().requires_grad();
      has_tangent |= tensors.back()._fw_grad(/*level=*/0).defined();
    }
    if (!at::GradMode::is_enabled()) n_grad = 0;
  }

  // Whether another of the tensors that require grad has the memory of the i-th.
  bool share_memory(size_t i) const {
    const auto is_other = [&](const at::Tensor& other) {
      return other.requires_grad() && &other != &tensors[i] && other.is_alias_of(tensors[i]);
    };
    return n_grad > 1 && std::any_of(tensors.begin(), tensors.end(), is_other);
  }

  PyObject* at(Py_ssize_t i) const { return in_tuple ? PyTuple_GET_ITEM(given, i) : given; }

  // The same with other tensors at their places; undefined stands for the one that is there.
  py::object with(const variable_list& others) const {
    if (!in_tuple) return wrapped(others[0]);
    auto made = py::reinterpret_steal<py::object>(PyTuple_New(n));
    for (Py_ssize_t i = 0, number = 0; i < n; ++i) {
      const bool is_tensor = number < Py_ssize_t(places.size()) && places[size_t(number)] == i;
      const at::Tensor* const other = is_tensor ? &others[size_t(number++)] : nullptr;
      PyTuple_SET_ITEM(made.ptr(), i, other && other->defined() ? THPVariable_Wrap(*other) : Py_NewRef(at(i)));
    }
    if (PyTuple_CheckExact(given)) return made;
    return result_of(PyObject_Call(reinterpret_cast<PyObject*>(Py_TYPE(given)), made.ptr(), nullptr));
  }

  const bool in_tuple;
  PyObject* const given;
  const Py_ssize_t n;
  int n_grad = 0;  // how many require grad
  bool has_tangent = false;
  variable_list tensors;
  Places places;
};

py::object pytorchs(FullHooks& self, const char* method, PyObject* given) {
  if (!self.instead) {
    PyObject* const make = self.call->has_readers ? checked_hook : plain_hook;
    self.instead = result_of(PyObject_CallFunctionObjArgs(make, self.call->module().ptr(), self.call->hooks().ptr(),
                                                          self.call->pre_hooks().ptr(), nullptr))
                       .release()
                       .ptr();
  }
  return py::handle(self.instead).attr(method)(py::handle(given));
}

py::object setup_inputs(FullHooks& self, PyObject* given) {
  const Items items(given);
  if (items.has_tangent) return pytorchs(self, "setup_input_hook", given);
  for (const py::handle hook : py::reinterpret_borrow<py::list>(self.call->hooks()))
    if (is_ours(hook.ptr())) tap_of(hook.ptr()).tap->forward_pre();
  PyFullCall& call = *self.call;
  call.n_inputs = items.n;
  if (!items.n_grad) return py::reinterpret_borrow<py::object>(given);
  call.has_inputs = true;
  call.input_places = items.places;
  self.inputs.emplace(self.call, FullNode::Side::inputs, items.tensors);
  variable_list through;
  through.reserve(items.tensors.size());
  for (size_t i = 0; i < items.tensors.size(); ++i) {
    const at::Tensor& tensor = items.tensors[i];
    at::Tensor made;
    if (tensor.requires_grad()) {
      // What is changed in place is the tensor that was given, too: see `renew`. A leaf, a view and what has no plain
      // memory can't be given another history, and one of two inputs would not have the history of the other.
      const bool renewable = is_plain(tensor) && tensor.grad_fn() && !tensor.is_view() && !items.share_memory(i);
      made = detached(items.at(items.places[i]));
      if (!renewable) forbid_in_place(tensor, made, items.n_grad > 1);
      if (renewable) self.renewable.emplace_back(tensor, made, items.n_grad > 1);
    }
    self.inputs->add(tensor, made);
    through.push_back(std::move(made));
  }
  for (auto& one : self.renewable) one.readers = size_t(one.history.function.use_count());
  self.holders = self.inputs->holders();
  return items.with(through);
}

// Whether something has read or changed an input in the forward under another name than the one that the module has:
// then one of the two has not the history of what was done to the other.
bool has_second_name(const FullHooks& self, const Renewable& input, const at::Tensor& given, bool renewed) {
  if (torch::autograd::impl::gradient_edge(given) != input.history)
    return renewed || self.inputs->holders() > self.holders;
  if (!renewed) return false;
  // Its object and `given` hold it. A view does, too, and whether it was read can't be known.
  return size_t(input.history.function.use_count()) > input.readers || given.use_count() > 2;
}

// Inputs that the module has changed in place: under their old names they have the history of the change, too.
void renew(FullHooks& self) {
  for (const Renewable& input : self.renewable) {
    const at::Tensor given(input.given.lock()), through(input.through.lock());
    if (!given.defined() || !through.defined()) continue;  // nobody can use it any more
    const bool renewed = !self.inputs->made(through);
    TORCH_CHECK(!has_second_name(self, input, given, renewed),
                broken_rule("register_full_backward_hook", "an input that the module changes in place",
                            "be known to it by one name", "another argument, attribute or view of the same memory",
                            "Clone it there, or don't change it in place."));
    if (renewed && through.grad_fn())
      torch::autograd::impl::rebase_history(given, torch::autograd::impl::gradient_edge(through));
    else if (renewed)
      given.detach_();
    // Whoever keeps one could change it later on, and use the other.
    const Py_ssize_t names = Py_REFCNT(wrapped(through).ptr());
    if (learning) names_of_inputs = names;
    if (names > names_of_inputs) forbid_in_place_from_now(given, through, input.of_several);
  }
  self.renewable.clear();
}

// Whether nobody but the running frames can use the memory of an output under another name.
bool is_only_name(const Items& items, size_t i) {
  const References* const most = outputs.most();
  if (!most || (items.in_tuple && !PyTuple_CheckExact(items.given))) return false;
  PyObject* const object = items.at(items.places[i]);
  const at::Tensor& tensor = items.tensors[i];
  References seen = References::of(object, tensor);
  seen.node = 0;
  if (items.in_tuple) {
    if (Py_REFCNT(items.given) > most->object || seen.object > 1) return false;
    seen.object = most->object;
  }
  const auto* const view = torch::autograd::impl::get_view_autograd_meta(tensor);
  if (view && view->has_bw_view()) {
    if (view->get_backward_view().base_.use_count() != 1) return false;
    seen.storage -= 1;
  }
  return seen.within(*most);
}

// The taps among the hooks: which tensor of the output each of them reads.
void find_readers(PyFullCall& call, const Items& items) {
  for (const py::handle hook : py::reinterpret_borrow<py::list>(call.hooks())) {
    if (!is_ours(hook.ptr())) continue;
    PyTap& tap = tap_of(hook.ptr());
    const Py_ssize_t place = tap.place_for_full(items.given);
    const auto found = std::find(items.places.begin(), items.places.end(), place);
    if (found == items.places.end()) continue;
    call.readers.emplace_back(py::reinterpret_borrow<py::object>(hook), tap.tap, place,
                              size_t(found - items.places.begin()));
  }
}

py::object setup_outputs(FullHooks& self, PyObject* given) {
  if (self.instead) return pytorchs(self, "setup_output_hook", given);
  renew(self);
  if (!THPVariable_Check(given) && !PyTuple_Check(given) && !self.call->has_readers &&
      is_named(self.call->module().ptr())) {
    // PyTorch leaves mappings, lists and dataclasses alone. Their items are taken as those of a tuple.
    const auto outputs = py::module_::import("tlfast.backends.outputs");
    const py::object values = outputs.attr("values_of")(py::handle(given));
    if (values.is_none()) return py::reinterpret_borrow<py::object>(given);
    return outputs.attr("with_values")(py::handle(given), setup_outputs(self, values.ptr()));
  }
  const Items items(given);
  if (learning) {
    outputs.learn(References::of(items.at(0), items.tensors.at(0)));
    return py::reinterpret_borrow<py::object>(given);
  }
  if (items.has_tangent) return pytorchs(self, "setup_output_hook", given);
  PyFullCall& call = *self.call;
  call.n_outputs = items.n;
  if (call.has_readers && at::GradMode::is_enabled()) find_readers(call, items);
  if (!items.n_grad) return py::reinterpret_borrow<py::object>(given);
  call.output_places = items.places;
  FullNode node(self.call, FullNode::Side::outputs, items.tensors);
  variable_list through;
  through.reserve(items.tensors.size());
  for (size_t i = 0; i < items.tensors.size(); ++i) {
    const at::Tensor& tensor = items.tensors[i];
    at::Tensor made;
    if (tensor.requires_grad()) {
      const bool only_name = is_only_name(items, i);
      made = detached(items.at(items.places[i]));
      if (!only_name) forbid_in_place(tensor, made, items.n_grad > 1);
    }
    node.add(tensor, made);
    through.push_back(std::move(made));
  }
  return items.with(through);
}

PyObject* setup_input_hook(PyObject* self, PyObject* given) {
  return guarded([&] { return setup_inputs(*reinterpret_cast<FullHooks*>(self), given); });
}

PyObject* setup_output_hook(PyObject* self, PyObject* given) {
  return guarded([&] { return setup_outputs(*reinterpret_cast<FullHooks*>(self), given); });
}

PyMethodDef full_hooks_methods[] = {
    {"setup_input_hook", setup_input_hook, METH_O, "Put a node before the inputs of a module."},
    {"setup_output_hook", setup_output_hook, METH_O, "Put a node behind its outputs."},
    {nullptr, nullptr, 0, nullptr},
};

PyTypeObject* full_hooks_type() {
  static PyTypeObject* const type = [] {
    static PyType_Slot slots[] = {
        {Py_tp_dealloc, reinterpret_cast<void*>(free_full_hooks)},
        {Py_tp_methods, full_hooks_methods},
        {0, nullptr},
    };
    static PyType_Spec spec = {
        .name = "tlfast._C.FullHooks",
        .basicsize = sizeof(FullHooks),
        .itemsize = 0,
        .flags = Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION,
        .slots = slots,
    };
    return reinterpret_cast<PyTypeObject*>(result_of(PyType_FromSpec(&spec)).release().ptr());
  }();
  return type;
}

py::object make_full_hooks(PyObject* module, PyObject* hooks, PyObject* pre_hooks) {
  PyTypeObject* const type = full_hooks_type();
  auto made = result_of(type->tp_alloc(type, 0));
  auto* const held = reinterpret_cast<FullHooks*>(made.ptr());
  new (&held->call) std::shared_ptr<PyFullCall>(std::make_shared<PyFullCall>(module, hooks, pre_hooks));
  new (&held->inputs) std::optional<FullNode>();
  new (&held->renewable) decltype(held->renewable)();
  return made;
}

// Whether a module's hooks are to be native ones.
bool are_wanted(PyObject* module, PyObject* hooks) {
  if (for_all) return true;
  if (PyDict_GET_SIZE(for_ids) && (is_named(module) || is_named(reinterpret_cast<PyObject*>(Py_TYPE(module)))))
    return true;
  return has_ours(hooks);
}

// Whether only PyTorch's own hooks can be right: what traces or transforms a forward must see what it knows.
bool must_be_pytorchs() {
  // What records operations (make_fx, torch.export, fake tensors, a mode of somebody's own) would record another one
  // for each node: one that cuts the graph where the record is run.
  const auto included = c10::impl::tls_local_dispatch_key_set().included_;
  return included.has(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
         included.has(c10::DispatchKey::PreDispatch) || c10::impl::dispatch_mode_enabled() ||
         torch::jit::tracer::isTracing() || compiled_autograd_is_on();
}

// chooser(module, hooks, pre_hooks)
PyObject* call_chooser(PyObject*, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    TORCH_CHECK_TYPE(PyTuple_GET_SIZE(args) == 3 && !kwargs && PyList_Check(PyTuple_GET_ITEM(args, 1)) &&
                         PyList_Check(PyTuple_GET_ITEM(args, 2)),
                     broken_rule("BackwardHook", "a module's hooks", "be given as two lists behind the module",
                                 py::repr(args).cast<std::string>(), "Leave the call to the module."));
    PyObject *const module = PyTuple_GET_ITEM(args, 0), *const hooks = PyTuple_GET_ITEM(args, 1),
                    *const pre_hooks = PyTuple_GET_ITEM(args, 2);
    if (are_wanted(module, hooks) && !must_be_pytorchs()) return make_full_hooks(module, hooks, pre_hooks);
    return result_of(
        PyObject_CallFunctionObjArgs(has_ours(hooks) ? checked_hook : plain_hook, module, hooks, pre_hooks, nullptr));
  });
}

}  // namespace

void choose_natively(const py::type& chooser, const py::type& ours, const py::object& plain,
                     const py::object& checked) {
  check_ours_to_change("choose_natively", chooser);
  for (const py::object& hook : {plain, checked})
    TORCH_CHECK_TYPE(PyCallable_Check(hook.ptr()), broken_rule("choose_natively", "what makes hooks", "be callable",
                                                               type_name(hook), "Pass a class."));
  ours_are(reinterpret_cast<PyTypeObject*>(ours.ptr()));
  plain_hook = Py_NewRef(plain.ptr());
  checked_hook = Py_NewRef(checked.ptr());
  if (!for_ids) for_ids = PyDict_New();
  reinterpret_cast<PyTypeObject*>(chooser.ptr())->tp_call = call_chooser;
}

void choose_for(bool all, const py::dict& ids) {
  for_all = all;
  Py_XSETREF(for_ids, Py_NewRef(ids.ptr()));
}

void learn_outputs(bool on) { learning = on; }

}  // namespace tlfast
