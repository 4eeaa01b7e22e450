// What a backward needs of its mask and its streams.
#include "backward.h"

#include <algorithm>
#include <utility>

namespace tlfast {

Step Backward::step_at(const Column& column, const std::optional<at::Tensor>& mask) const {
  static const OwnInputs none;
  const auto found = batch->own.find(&column);
  return {.mask = mask, .scale = batch->scale, .own = found == batch->own.end() ? none : found->second};
}

std::optional<at::Tensor> Backward::mask_on(const at::Device& device) {
  const auto& mask = batch->mask;
  if (!mask) return {};
  const bool recording = block && block->cursor;
  const at::Device& there = mask->tensor.device();
  if (there == device || there.type() != device.type()) return mask->here(recording);
  std::lock_guard<std::mutex> lock(copying_);
  for (const auto& copy : masks_elsewhere_)
    if (copy.tensor.device() == device) return copy.here(recording);
  masks_elsewhere_.emplace_back(mask->here(recording).to(device, /*non_blocking=*/true), recording);
  return masks_elsewhere_.back().tensor;
}

void Backward::write_on(const c10::Stream& stream, bool again, const Ledger& ledger) {
  if (std::find(streams_.begin(), streams_.end(), stream) == streams_.end()) {
    streams_.push_back(stream);
    if (!block->cursor) {  // a recording begins when the device is idle, and can wait only for what it holds
      const auto failed = ledger.failed();
      for (const Done& done : failed) wait_for(done, stream);
      if (waited_.empty()) waited_ = failed;
    }
  }
  if (!again) return;
  for (const c10::Stream& other : streams_)
    if (other != stream) wait_for(done_by_now(other), stream);
}

std::vector<c10::Stream> Backward::join_streams() {
  std::vector<c10::Stream> joined;
  for (const c10::Stream& stream : streams_) {
    const c10::Stream caller = current_stream(stream.device());
    if (caller == stream) continue;
    wait_for(done_by_now(stream), caller);
    joined.push_back(caller);
  }
  streams_.clear();
  return joined;
}

void Backward::give_up(Ledger& ledger) const noexcept {
  if (streams_.empty() || (block && block->cursor)) return;
  try {
    std::vector<Done> written;
    for (const c10::Stream& stream : streams_) written.push_back(done_by_now(stream));
    ledger.note_failed(waited_, written);
  } catch (const std::exception&) {  // the device itself has failed, and does nothing more
  }
}

}  // namespace tlfast
