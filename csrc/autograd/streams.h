// The order of a GPU's work, as torch knows it: current streams, and what waits for what.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <memory>

namespace tlfast {

// Whether this is the build of `make simt`, in which tensors of the CPU are on a GPU.
extern const bool cpu_plays_gpu;

// Whether the CUDA kernels do the work for tensors like this one.
bool on_gpu(const at::Tensor& tensor);

// The current stream of a GPU.
c10::Stream current_stream(const at::Device& device);

// A stream as CUDA knows it, for a launch.
void* native(const c10::Stream& stream);

// What happens when all is done that a stream holds by now.
struct Event;
using Done = std::shared_ptr<const Event>;
Done done_by_now(const c10::Stream& stream);

// Let what a stream gets from now on wait for that, on the device; null is done already.
void wait_for(const Done& done, const c10::Stream& stream);

// Tell the allocator that a stream reads a tensor whose memory may be another stream's.
void read_on(const c10::Stream& stream, const at::Tensor& tensor);

}  // namespace tlfast
