// Streams where the CPU plays the GPU: numbers, and a note of each launch, event and wait, in the order of the host.
// Everything is done at once; the notes tell whether a GPU, which may do it later, would have had to keep that order.
#include "autograd/streams.h"

#include <torch/library.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

namespace tlfast {

struct Event {
  int64_t number;
};

namespace {

thread_local int64_t current_id = 0;
std::atomic<int64_t> next_event{0};
std::mutex mutex;
bool noting = false;
std::vector<std::string> notes;

void note(const char* what, const c10::Stream& stream, int64_t event = -1) {
  std::lock_guard<std::mutex> lock(mutex);
  if (noting)
    notes.push_back(std::string(what) + " " + std::to_string(stream.id()) +
                    (event < 0 ? "" : " " + std::to_string(event)));
}

// Make a stream the current one of this thread; returns the one before.
int64_t set_stream(int64_t id) { return std::exchange(current_id, id); }

void start_notes() {
  std::lock_guard<std::mutex> lock(mutex);
  notes.clear();
  noting = true;
}

std::vector<std::string> take_notes() {
  std::lock_guard<std::mutex> lock(mutex);
  noting = false;
  return std::exchange(notes, {});
}

}  // namespace

const bool cpu_plays_gpu = true;

bool on_gpu(const at::Tensor& tensor) { return tensor.is_cpu(); }

c10::Stream current_stream(const at::Device& device) { return c10::Stream(c10::Stream::UNSAFE, device, current_id); }

void* native(const c10::Stream& stream) {
  note("launch", stream);
  return nullptr;
}

Done done_by_now(const c10::Stream& stream) {
  const auto done = std::make_shared<Event>(Event{next_event++});
  note("record", stream, done->number);
  return done;
}

void wait_for(const Done& done, const c10::Stream& stream) {
  if (done) note("wait", stream, done->number);
}

void read_on(const c10::Stream& stream, const at::Tensor&) { note("read", stream); }

TORCH_LIBRARY_FRAGMENT(tlfast_simt, library) {
  library.def("set_stream(int id) -> int", &set_stream);
  library.def("start_notes() -> ()", &start_notes);
  library.def("take_notes() -> str[]", &take_notes);
}

}  // namespace tlfast
