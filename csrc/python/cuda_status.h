// What CUDA finds on this machine, as Python values; asks only when it is called.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace tlfast {

// built, simt, error (a cudaError_t), message, n_devices, and driver and runtime as CUDA writes versions (13000 is
// 13.0). All zero in a build without CUDA.
pybind11::dict cuda_status();

// The compute capability of a device: (9, 0) of an H100.
std::pair<int, int> cuda_capability(int device);

}  // namespace tlfast
