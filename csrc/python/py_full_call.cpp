// Full backward hooks in a backward, with PyTorch's contract to the letter: torch/utils/hooks.py is the model.
#include "py_full_call.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "python_result.h"

namespace py = pybind11;

namespace tlfast {
namespace {

using torch::autograd::variable_list;

PyTypeObject* ours = nullptr;  // never dropped

// A tuple of `size`: the tensors at their places, None elsewhere.
py::object packed(const Places& places, const variable_list& tensors, Py_ssize_t size) {
  auto made = py::reinterpret_steal<py::object>(PyTuple_New(size));
  for (size_t i = 0; i < places.size(); ++i) PyTuple_SET_ITEM(made.ptr(), places[i], THPVariable_Wrap(tensors[i]));
  for (Py_ssize_t i = 0; i < size; ++i)
    if (!PyTuple_GET_ITEM(made.ptr(), i)) PyTuple_SET_ITEM(made.ptr(), i, py::none().release().ptr());
  return made;
}

// What hooks made of gradients, in place of these: the checks that PyTorch makes of what a node's hook returns.
void put(variable_list& grads, const Places& places, const py::object& made) {
  for (size_t i = 0; i < places.size(); ++i) {
    const auto index = py::int_(places[i]);
    const py::object item = result_of(PyObject_GetItem(made.ptr(), index.ptr()));
    if (item.is_none()) {
      grads[i] = at::Tensor();
      continue;
    }
    if (!grads[i].defined()) throw std::runtime_error("can't replace a None gradient with a non-None value");
    if (!THPVariable_Check(item.ptr())) {
      PyErr_Format(PyExc_TypeError, "expected Variable, but hook returned '%s'", Py_TYPE(item.ptr())->tp_name);
      result_of(nullptr);
    }
    const at::Tensor& tensor = THPVariable_Unpack(item.ptr());
    torch::autograd::check_variable_result(grads[i], tensor, "hook");
    grads[i] = tensor;
  }
}

Py_ssize_t size_of(const py::object& given) {
  const Py_ssize_t size = PyObject_Size(given.ptr());
  if (size < 0) result_of(nullptr);
  return size;
}

constexpr const char* kNoInputs =
    "Full backward hook is firing when gradients are computed with respect to module outputs since no inputs require "
    "gradients. See https://docs.pytorch.org/docs/main/generated/"
    "torch.nn.Module.html#torch.nn.Module.register_full_backward_hook for more details.";

bool all_none(const py::object& given) {
  if (!PyTuple_Check(given.ptr())) return false;
  for (const py::handle item : py::reinterpret_borrow<py::tuple>(given))
    if (!item.is_none()) return false;
  return true;
}

py::object result_of_call(const py::object& hook, std::initializer_list<PyObject*> args) {
  return result_of(PyObject_Vectorcall(hook.ptr(), args.begin(), args.size(), nullptr));
}

// Fire a tap with what Python's pre-hooks may have made of the gradients.
void fire(const PyFullCall::Reader& reader, const py::object& grad_output) {
  const auto index = py::int_(reader.place);
  const py::object grad = result_of(PyObject_GetItem(grad_output.ptr(), index.ptr()));
  if (!THPVariable_Check(grad.ptr())) return;
  const at::Tensor tensor = THPVariable_Unpack(grad.ptr());
  const py::gil_scoped_release release;
  reader.fire(tensor);
}

}  // namespace

bool is_ours(PyObject* hook) { return Py_TYPE(hook) == ours; }

void ours_are(PyTypeObject* type) {
  Py_INCREF(type);
  ours = type;
}

PyFullCall::PyFullCall(PyObject* module, PyObject* hooks, PyObject* pre_hooks)
    : module_(py::reinterpret_borrow<py::object>(module)),
      hooks_(py::reinterpret_borrow<py::object>(hooks)),
      pre_hooks_(py::reinterpret_borrow<py::object>(pre_hooks)),
      n_pre_hooks_(PyList_GET_SIZE(pre_hooks)) {
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(hooks); ++i)
    (is_ours(PyList_GET_ITEM(hooks, i)) ? has_readers : reads_python) = true;
}

PyFullCall::~PyFullCall() {
  if (!Py_IsInitialized()) {
    for (py::object* held : {&module_, &hooks_, &pre_hooks_, &grad_output_}) held->release();
    for (auto& reader : readers) reader.hook.release();
    return;
  }
  std::optional<py::gil_scoped_acquire> gil;
  if (!PyGILState_Check()) gil.emplace();
  for (py::object* held : {&module_, &hooks_, &pre_hooks_, &grad_output_}) *held = {};
  readers.clear();
}

template <class CallHook>
void PyFullCall::each_hook(const py::object& grad_output, CallHook call_hook) const {
  auto reader = readers.begin();
  for (Py_ssize_t i = 0; i < PyList_GET_SIZE(hooks_.ptr()); ++i) {
    const auto hook = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(hooks_.ptr(), i));
    if (!is_ours(hook.ptr()))
      call_hook(hook);
    else if (reader != readers.end() && reader->hook.is(hook))  // else its output can have no gradient
      fire(*reader++, grad_output);
  }
}

void PyFullCall::at_outputs(variable_list& grads, c10::function_ref<variable_list()> filled) {
  if (has_inputs && !n_pre_hooks_) {
    std::lock_guard<std::mutex> lock(mutex_);
    came_ = grads;
    return;
  }
  const py::gil_scoped_acquire gil;
  py::object grad_output = packed(output_places, grads, n_outputs);
  for (Py_ssize_t i = 0; i < n_pre_hooks_; ++i) {
    const auto hook = py::reinterpret_borrow<py::object>(PyList_GET_ITEM(pre_hooks_.ptr(), i));
    const py::object made = result_of_call(hook, {module_.ptr(), grad_output.ptr()});
    if (made.is_none()) continue;
    const Py_ssize_t size = size_of(made);
    TORCH_CHECK(size == n_outputs, "Backward pre hook returned an invalid number of grad_output, got ", size,
                ", but expected ", n_outputs);
    grad_output = made;
  }
  if (has_inputs) {
    grad_output_ = grad_output;
  } else {
    // No input requires grad: the hooks are called here, and may change nothing. Level 1 is the frame that entered the
    // engine.
    if (PyErr_WarnEx(PyExc_UserWarning, kNoInputs, 4) < 0) result_of(nullptr);
    const py::object nothing = packed({}, {}, n_inputs);
    each_hook(grad_output, [&](const py::object& hook) {
      const py::object made = result_of_call(hook, {module_.ptr(), nothing.ptr(), grad_output.ptr()});
      TORCH_CHECK(made.is_none() || all_none(made),
                  "Backward hook for Modules where no input requires gradient should always return None or None for "
                  "all gradients.");
    });
  }
  variable_list changed = filled();
  put(changed, output_places, grad_output);
  grads = std::move(changed);
}

void PyFullCall::at_inputs(variable_list& grads) {
  std::optional<variable_list> came;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    came_.swap(came);
  }
  if (came && !reads_python) {
    for (const auto& reader : readers) reader.fire((*came)[reader.number]);
    return;
  }
  if (!came && !n_pre_hooks_) return;  // this gradient has not come through the outputs
  const py::gil_scoped_acquire gil;
  if (!came && !grad_output_) return;
  const py::object grad_output = came ? packed(output_places, *came, n_outputs) : grad_output_;
  py::object grad_input = packed(input_places, grads, n_inputs);
  bool changed = false;
  each_hook(grad_output, [&](const py::object& hook) {
    py::object made = result_of_call(hook, {module_.ptr(), grad_input.ptr(), grad_output.ptr()});
    if (made.is_none()) return;
    const Py_ssize_t got = size_of(made), expected = size_of(grad_input);
    TORCH_CHECK(got == expected, "Backward hook returned an invalid number of grad_input, got ", got, ", but expected ",
                expected);
    grad_input = std::move(made);
    changed = true;
  });
  grad_output_ = {};
  if (changed) put(grads, input_places, grad_input);
}

}  // namespace tlfast
