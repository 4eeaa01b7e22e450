// PyTorch's call of a module, without its path of hooks where one tap is all that is there.
#include "py_module_call.h"

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <array>
#include <atomic>
#include <utility>

#include "kernel/errors.h"
#include "py_callable.h"
#include "py_objects.h"
#include "references.h"

namespace py = pybind11;

namespace tlfast {
namespace {

// What PyTorch has for all modules, and the names of what each of them has; never dropped.
struct PyTorch {
  static const PyTorch& get() {
    static const auto* const made = new PyTorch();
    return *made;
  }

  const py::module_ module = py::module_::import("torch.nn.modules.module");
  const std::array<py::object, 4> hooks{module.attr("_global_backward_pre_hooks"),
                                        module.attr("_global_backward_hooks"), module.attr("_global_forward_hooks"),
                                        module.attr("_global_forward_pre_hooks")};
  const py::object type = module.attr("Module");
  const py::object call = type.attr("_call_impl"), code_around_call = type.attr("_wrapped_call_impl").attr("__code__");
  const py::str call_name = interned("_call_impl"), compiled_name = interned("_compiled_call_impl"),
                forward_name = interned("forward"), native_name = interned("native"),
                forward_hooks = interned("_forward_hooks"), forward_pre_hooks = interned("_forward_pre_hooks"),
                backward_hooks = interned("_backward_hooks"), backward_pre_hooks = interned("_backward_pre_hooks");

  bool has_global_hooks() const {
    for (const py::object& held : hooks)
      if (PyDict_GET_SIZE(held.ptr())) return true;
    return false;
  }

 private:
  PyTorch() = default;
};

Unshared unshared_in_call;  // an output as the forward of a module returns it
// How often the object in a module's dictionary is referenced while that module calls it, where nobody else holds it:
// learnt as well.
std::atomic<Py_ssize_t> most_references{0};

// Whether a dictionary of hooks in that of a module has this one, and no other; none at all where it is null.
bool has_alone(const py::dict& dict, const py::str& name, PyObject* hook) {
  PyObject* const hooks = item(dict, name);
  if (!hooks || !PyDict_Check(hooks) || PyDict_GET_SIZE(hooks) != (hook ? 1 : 0)) return false;
  PyObject* found = nullptr;
  Py_ssize_t place = 0;
  return !hook || (PyDict_Next(hooks, &place, nullptr, &found) && found == hook);
}

// The module whose `__call__` has called us, as its frame has it; null where something else has.
py::object caller() {
  const auto frame = py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(PyEval_GetFrame()));
  if (!frame || py::object(frame.attr("f_code")).ptr() != PyTorch::get().code_around_call.ptr()) return {};
  return frame.attr("f_locals")["self"];
}

py::object pytorchs_way(const py::handle& module, PyObject* args, PyObject* kwargs) {
  const py::object call = owned(PyObject_GetAttr(module.ptr(), PyTorch::get().call_name.ptr()));
  return owned(PyObject_Call(call.ptr(), args, kwargs));
}

// What a module's `__call__` calls: self(*args, **kwargs)
PyObject* call_module(PyObject* self, PyObject* args, PyObject* kwargs) {
  return guarded([&] {
    const py::object native = owned(PyObject_GetAttr(self, PyTorch::get().native_name.ptr()));
    py::detail::make_caster<ModuleCall> call;
    TORCH_CHECK_TYPE(
        call.load(native, /*convert=*/false) && !native.is_none(),
        broken_rule("capture", "a module's call", "have a native one", type_name(native), "Leave it as it was."));
    return py::detail::cast_op<ModuleCall&>(call).run(self, args, kwargs);
  });
}

}  // namespace

ModuleCall::ModuleCall(const py::object& module, py::object hook, py::object before, int64_t holders)
    : module_([&] {
        const bool is_module = py::isinstance(module, PyTorch::get().type);
        TORCH_CHECK_TYPE(is_module,
                         broken_rule("capture", "module", "be an nn.Module", type_name(module), "Pass one."));
        return py::weakref(module);
      }()),
      hook_(std::move(hook)),
      before_(std::move(before)),
      tap_([&] {
        TORCH_CHECK_TYPE(py::hasattr(hook_, "tap"), broken_rule("capture", "hook", "be one of a tap", type_name(hook_),
                                                                "Pass what is registered."));
        return py::object(hook_.attr("tap"));
      }()),
      native_tap_(tap_of(hook_.ptr())),
      holders_(holders) {}

// Whether another module may have us, too: its dictionary was copied from that of ours, as of a replica.
bool ModuleCall::is_shared(const py::handle& module, PyObject* self) const {
  if (Py_REFCNT(self) > most_references + holders_ || module.is_none()) return true;
  return item(dict_of(module), PyTorch::get().compiled_name) != self;
}

// Whether PyTorch would call our hooks, the forward in between, and nothing else.
bool ModuleCall::is_ours(const py::handle& module) const {
  const PyTorch& torch = PyTorch::get();
  if (torch::jit::tracer::isTracing() || torch.has_global_hooks() ||
      _PyType_Lookup(Py_TYPE(module.ptr()), torch.call_name.ptr()) != torch.call.ptr())
    return false;
  const py::dict dict = dict_of(module);
  return has_alone(dict, torch.forward_hooks, hook_.ptr()) &&
         has_alone(dict, torch.forward_pre_hooks, before_.is_none() ? nullptr : before_.ptr()) &&
         has_alone(dict, torch.backward_hooks, nullptr) && has_alone(dict, torch.backward_pre_hooks, nullptr) &&
         !item(dict, torch.call_name);
}

// The same of what comes behind the forward: while that ran, others may have registered hooks.
bool ModuleCall::is_still_ours(const py::handle& module) const {
  const PyTorch& torch = PyTorch::get();
  return has_alone(dict_of(module), torch.forward_hooks, hook_.ptr()) && !torch.has_global_hooks();
}

py::object ModuleCall::run(PyObject* self, PyObject* args, PyObject* kwargs) const {
  if (Py_ssize_t none = 0; native_tap_.learning()) most_references.compare_exchange_strong(none, Py_REFCNT(self));
  const py::object module = led_to(module_);
  if (is_shared(module, self))
    if (const py::object other = caller(); other && !other.is(module)) return pytorchs_way(other, args, kwargs);
  if (!is_ours(module)) return pytorchs_way(module, args, kwargs);
  return with_hooks(module, self, args, kwargs);
}

py::object ModuleCall::with_hooks(const py::handle& module, PyObject* self, PyObject* args, PyObject* kwargs) const {
  const auto rest = [&](const py::object& result, const py::object& error) {
    return py::handle(self).attr("rest")(module, py::handle(args), kwargs ? py::handle(kwargs) : py::dict(), result,
                                         error);
  };
  if (!before_.is_none()) native_tap_.tap->forward_pre();
  py::object output;
  try {
    const py::object forward = owned(PyObject_GetAttr(module.ptr(), PyTorch::get().forward_name.ptr()));
    output = owned(PyObject_Call(forward.ptr(), args, kwargs && PyDict_GET_SIZE(kwargs) ? kwargs : nullptr));
  } catch (py::error_already_set& error) {
    if (is_still_ours(module) || !error.matches(PyExc_Exception)) throw;
    return rest(py::none(), error.value());
  }
  if (!is_still_ours(module)) return rest(output, py::none());
  // Where a cached gradient may be one that a full backward hook finds at the output, Python looks: see CacheHook.
  if (native_tap_.tap->backwards->anchor.defined() && !passed_on(args, output.ptr())) {
    const py::object other = hook_.attr("__call__")(module, py::handle(args), output);
    return other.is_none() ? output : other;
  }
  const bool reads = native_tap_.tap->keeper->reads_inputs();
  const py::object other = native_tap_.forward(output, reads ? py::handle(args) : py::handle(),
                                               reads ? py::handle(kwargs) : py::handle(), unshared_in_call);
  return other.is_none() ? output : other;
}

void ModuleCall::call_natively(const py::type& caller) {
  check_ours_to_change("call_modules_natively", caller);
  reinterpret_cast<PyTypeObject*>(caller.ptr())->tp_call = call_module;
}

}  // namespace tlfast
