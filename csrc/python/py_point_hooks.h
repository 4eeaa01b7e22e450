// The hooks of a cached run, on all of its points at once.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <tuple>
#include <vector>

namespace tlfast {

// A run of a model puts a hook on every point and takes it off again: one by one, from Python, that costs more than
// what the hooks do.
class PointHooks {
 public:
  // The module; its CachingHooks, which know it while they are there; the forward hook; the call that stands in the
  // module's dictionary; the handle that its lists get; and whether there is something that TransformerLens makes of a
  // tensor before its hooks see it.
  using Given =
      std::tuple<pybind11::object, pybind11::object, pybind11::object, pybind11::object, pybind11::object, bool>;

  // `hook_id`: the number of all the hooks. `lists`: those of a point that list its handle. `own_ways`: what a point
  // has itself only where it is to be hooked in its own way.
  PointHooks(const std::vector<Given>& points, const pybind11::int_& hook_id, std::vector<pybind11::str> lists,
             std::vector<pybind11::str> own_ways);

  // Put them where there is nothing else than points; the places of the others, which are left to the caller.
  std::vector<size_t> put();

  // Take off what is there of those that were put.
  void take_off();

 private:
  struct One {
    pybind11::weakref point;
    pybind11::object hooks, hook, call, handle;
    bool converts, is_on = false;
  };
  bool is_bare(const pybind11::object& point, const pybind11::dict& own, bool converts) const;
  void put_on(const One& one, const pybind11::object& point, const pybind11::dict& own) const;
  void take_off(const One& one, const pybind11::dict& own) const;

  const pybind11::int_ hook_id_;
  const std::vector<pybind11::str> lists_, own_ways_;
  std::vector<One> points_;
};

}  // namespace tlfast
