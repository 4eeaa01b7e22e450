// What torch knows of a GPU and the kernels need: the current stream, launches, their errors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <memory>

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

// What happens when all is done that the current stream of a GPU holds by now; null where nothing runs later.
using Done = std::shared_ptr<const c10::Event>;
Done done_by_now(const at::Device& device);

// Let what the current stream gets from now on wait for that, on the device.
void wait_for(const Done& done, const at::Device& device);

// Tell the allocator that the current stream reads a tensor whose memory may be another stream's.
void read_here(const at::Tensor& tensor);

// Memory for the parts of a reduction that is split, undefined where it isn't; taken in advance, never in a hook.
at::Tensor scratch_for(const CudaCapture& call, const at::Tensor& like);

}  // namespace tlfast
