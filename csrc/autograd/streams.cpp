// Streams of CUDA. The build of `make simt` has tests/simt/streams.cpp in place of this file.
#include "streams.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace tlfast {

#if TLFAST_CUDA

struct Event {
  c10::Event event;
};

bool on_gpu(const at::Tensor& tensor) { return tensor.device().is_cuda(); }

c10::Stream current_stream(const at::Device& device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

void* native(const c10::Stream& stream) { return stream.native_handle(); }

Done done_by_now(const c10::Stream& stream) {
  const auto done = std::make_shared<Event>(Event{c10::Event(stream.device_type())});
  done->event.record(stream);
  return done;
}

void wait_for(const Done& done, const c10::Stream& stream) {
  if (done) done->event.block(stream);
}

void read_on(const c10::Stream& stream, const at::Tensor& tensor) { tensor.record_stream(stream); }

#else  // built without the CUDA kernels: nothing is on a GPU of ours, so nothing else is ever called

struct Event {};

bool on_gpu(const at::Tensor&) { return false; }
c10::Stream current_stream(const at::Device& device) { return c10::Stream(c10::Stream::DEFAULT, device); }
void* native(const c10::Stream&) { return nullptr; }
Done done_by_now(const c10::Stream&) { return nullptr; }
void wait_for(const Done&, const c10::Stream&) {}
void read_on(const c10::Stream&, const at::Tensor&) {}

#endif

}  // namespace tlfast
