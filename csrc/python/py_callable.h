// Python callables as the functions that native code calls.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <string>

#include "autograd/tap.h"

namespace tlfast {

std::string type_name(const pybind11::handle& given);

// A callable that is given each gradient; what it returns is dropped.
Sink sink_of(pybind11::object callable);

// A callable that is shown what a tap saw, with None for an activation that nothing reads; nothing for None.
std::function<void(const Seen&)> see_of(pybind11::object callable);

// A callable that makes a tensor of a tensor, outside of any graph; an empty change for None.
Change change_of(pybind11::object callable);

}  // namespace tlfast
