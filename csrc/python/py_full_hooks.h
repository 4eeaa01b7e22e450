// Full backward hooks natively: what stands in place of torch.utils.hooks.BackwardHook.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace tlfast {

// Let instances of a class make, when they are called as torch.utils.hooks.BackwardHook is, a FullHooks in its place,
// where that can be equal; else one of `checked`, if a hook of class `ours` is among the hooks, or of `plain`.
void choose_natively(const pybind11::type& chooser, const pybind11::type& ours, const pybind11::object& plain,
                     const pybind11::object& checked);

// For which modules they do so: for all, or for those whose ids are in a dict. Hooks of class `ours` always are.
void choose_for(bool all, const pybind11::dict& ids);

// From now on nothing is put behind anything, and the next output tells how often one is referenced that nobody holds.
void learn_outputs(bool learning);

}  // namespace tlfast
