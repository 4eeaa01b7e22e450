// Launches of the CUDA kernels on the streams of torch.
#pragma once

#include <ATen/core/Tensor.h>

#include "kernel/capture_cuda.h"
#include "streams.h"

namespace tlfast {

// Launch on a stream, whose device becomes the current one meanwhile; errors name `who`.
void launch_capture(const std::string& who, const c10::Stream& stream, const CudaCapture& call);

// The same on the current stream of the cursor's device.
void launch_set_cursor(const at::Tensor& cursor, int64_t row);
void launch_advance(const at::Tensor& cursor, int64_t n_rows);

// Memory for the parts of a reduction that is split, undefined where it isn't; taken in advance, never in a hook.
at::Tensor scratch_for(const CudaCapture& call, const at::Tensor& like);

}  // namespace tlfast
