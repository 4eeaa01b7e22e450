// Streams of CUDA. A build without CUDA has no_streams.cpp in place of this file, that of `make simt`
// tests/simt/streams.cpp.
#include "streams.h"

#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>

namespace tlfast {

struct Event {
  c10::Event event;
};

const bool cpu_plays_gpu = false;

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

}  // namespace tlfast
