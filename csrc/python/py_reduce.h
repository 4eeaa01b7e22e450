// The fused op, called from Python without torch's dispatcher: where that costs more than the work.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace tlfast {

// reduce_at_once(out, grad, reduce, over, mask, scale): whether it is done. Only for plain tensors of the CPU outside
// of graphs, modes and traces, and for arguments in their usual form; all else is left to the caller. What is wrong in
// the tensors is the op's own error.
extern PyMethodDef reduce_at_once;

}  // namespace tlfast
