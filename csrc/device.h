// What torch knows of a GPU and the kernels need: the current stream, launches, their errors.
#pragma once

#include <ATen/core/Tensor.h>

#include "capture_cuda.h"

namespace tlfast {

// Whether the CUDA kernels do the work for tensors like this one.
bool on_gpu(const at::Tensor& tensor);

// The current stream of a GPU, as CUDA knows it.
void* current_stream(const at::Device& device);

// Launch on `stream` of `device`, which becomes the current device meanwhile; errors name `who`.
void launch_capture(const std::string& who, const at::Device& device, void* stream, const CudaCapture& call);

// The same on the current stream of the cursor's device.
void launch_set_cursor(const at::Tensor& cursor, int64_t row);
void launch_advance(const at::Tensor& cursor, int64_t n_rows);

// Memory for the parts of a reduction that is split, undefined where it isn't; taken in advance, never in a hook.
at::Tensor scratch_for(const CudaCapture& call, const at::Tensor& like);

}  // namespace tlfast
