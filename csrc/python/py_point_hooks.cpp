// Hooks on the points of a TransformerLens model.
#include "py_point_hooks.h"

#include <array>
#include <utility>

#include "kernel/errors.h"
#include "py_callable.h"
#include "py_objects.h"

namespace py = pybind11;

namespace tlfast {
namespace {

struct PointNames {
  static const PointNames& get() {
    static const auto* const made = new PointNames();
    return *made;
  }
  const py::str call = interned("_compiled_call_impl"), modules = interned("_modules"),
                conversion = interned("hook_conversion"), module = interned("module"),
                forward_hooks = interned("_forward_hooks");
  // The dictionaries and lists in which a point has its hooks.
  const std::array<py::str, 6> hooks{interned("_forward_hooks"),  interned("_forward_pre_hooks"),
                                     interned("_backward_hooks"), interned("_backward_pre_hooks"),
                                     interned("fwd_hooks"),       interned("bwd_hooks")};
};

void checked(int status) {
  if (status < 0) throw py::error_already_set();
}

}  // namespace

PointHooks::PointHooks(const std::vector<Given>& points, const py::int_& hook_id, std::vector<py::str> lists,
                       std::vector<py::str> own_ways)
    : hook_id_(hook_id), lists_(std::move(lists)), own_ways_(std::move(own_ways)) {
  for (const auto& [point, hooks, hook, call, handle, converts] : points) {
    TORCH_CHECK_TYPE(py::hasattr(point, "_forward_hooks"),
                     broken_rule("run_with_cache", "a point", "be an nn.Module", type_name(point), "Pass one."));
    points_.push_back({py::weakref(point), hooks, hook, call, handle, converts});
  }
}

// Whether a point is what it is without anybody's hooks.
bool PointHooks::is_bare(const py::object& point, const py::dict& own, bool converts) const {
  const PointNames& names = PointNames::get();
  for (const py::str& name : own_ways_)
    if (item(own, name)) return false;
  for (const py::str& name : names.hooks) {
    PyObject* const hooks = item(own, name);
    if (!hooks || PyObject_Size(hooks) != 0) return false;
  }
  if (PyObject* const call = item(own, names.call); call && call != Py_None) return false;
  PyObject* conversion = item(own, names.conversion);
  if (PyObject* const modules = item(own, names.modules); !conversion && modules)
    conversion = item(py::reinterpret_borrow<py::dict>(modules), names.conversion);
  if (!conversion) conversion = _PyType_Lookup(Py_TYPE(point.ptr()), names.conversion.ptr());
  return (conversion && conversion != Py_None) == converts;
}

void PointHooks::put_on(const One& one, const py::object& point, const py::dict& own) const {
  const PointNames& names = PointNames::get();
  checked(PyObject_SetAttr(one.hooks.ptr(), names.module.ptr(), point.ptr()));
  checked(PyObject_SetItem(item(own, names.forward_hooks), hook_id_.ptr(), one.hook.ptr()));
  for (const py::str& name : lists_) checked(PyList_Append(item(own, name), one.handle.ptr()));
  checked(PyDict_SetItem(own.ptr(), names.call.ptr(), one.call.ptr()));
}

std::vector<size_t> PointHooks::put() {
  std::vector<size_t> left;
  for (size_t i = 0; i < points_.size(); ++i) {
    One& one = points_[i];
    const py::object point = led_to(one.point);
    const py::dict own = point.is_none() ? py::dict() : dict_of(point);
    if (point.is_none() || !is_bare(point, own, one.converts)) {
      left.push_back(i);
      continue;
    }
    one.is_on = true;
    put_on(one, point, own);
  }
  return left;
}

// By identity: handles compare by value, and others may have changed what is there.
void PointHooks::take_off(const One& one, const py::dict& own) const {
  const PointNames& names = PointNames::get();
  if (PyObject* const hooks = item(own, names.forward_hooks))
    if (PyMapping_Check(hooks) && PySequence_Contains(hooks, hook_id_.ptr()) == 1)
      checked(PyObject_DelItem(hooks, hook_id_.ptr()));
  for (const py::str& name : lists_) {
    PyObject* const listed = item(own, name);
    if (!listed || !PyList_Check(listed)) continue;
    for (Py_ssize_t i = PyList_GET_SIZE(listed); i-- > 0;)
      if (PyList_GET_ITEM(listed, i) == one.handle.ptr()) checked(PyList_SetSlice(listed, i, i + 1, nullptr));
  }
  if (item(own, names.call) == one.call.ptr()) checked(PyDict_DelItem(own.ptr(), names.call.ptr()));
}

void PointHooks::take_off() {
  for (One& one : points_) {
    if (!std::exchange(one.is_on, false)) continue;
    checked(PyObject_SetAttr(one.hooks.ptr(), PointNames::get().module.ptr(), Py_None));
    const py::object point = led_to(one.point);
    if (!point.is_none()) take_off(one, dict_of(point));
  }
}

}  // namespace tlfast
