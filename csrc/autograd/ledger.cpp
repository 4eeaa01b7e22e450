// The ledger: a backward commits its rows at all points together, or none.
#include "ledger.h"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <utility>

#include "kernel/errors.h"

namespace tlfast {

std::vector<at::Tensor> Recording::scratch() const {
  std::vector<at::Tensor> all;
  for (const auto& write : writes) all.insert(all.end(), write.scratch.begin(), write.scratch.end());
  return all;
}

void Recording::runs_on(const c10::Stream& stream) {
  if (std::find(replayed_on.begin(), replayed_on.end(), stream) != replayed_on.end()) return;
  replayed_on.push_back(stream);
  for (const auto& held : scratch()) read_on(stream, held);
}

std::shared_ptr<Block> Ledger::reserve(const std::string& who, int64_t n) {
  std::lock_guard<std::mutex> lock(mutex_);
  blocks_.push_back(std::make_shared<Block>(Block{.base = check_room(who, n), .n = n, .missing = {}}));
  if (recording_) blocks_.back()->cursor = cursor_.mutable_data_ptr<int64_t>();
  ++n_open_;
  return blocks_.back();
}

int64_t Ledger::check_room(const std::string& who, int64_t n) const {
  const int64_t base = blocks_.empty() ? 0 : blocks_.back()->base + blocks_.back()->n;
  TORCH_CHECK(base + n <= capacity_,
              broken_rule(who, "rows", c10::str("hold the ", base, " rows written and ", n, " more"), capacity_,
                          "Give capture more rows, or read them and call clear()."));
  return base;
}

void Ledger::commit(Block& block, std::vector<int64_t> missing) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (block.cursor) launch_advance(cursor_, block.n);  // the last kernel of the step
  block.missing = std::move(missing);
  --n_open_;
  commit_locked(block);
}

void Ledger::commit_locked(Block& block) {
  block.state = Block::State::committed;
  n_rows_ += block.n;
  ++n_ended;
  failed_.clear();
}

void Ledger::abort(Block& block) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (block.state != Block::State::open) return;
  block.state = Block::State::aborted;
  --n_open_;
  while (!blocks_.empty() && blocks_.back()->state == Block::State::aborted) blocks_.pop_back();
}

std::pair<int64_t, int64_t> Ledger::extent() const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block)
    if ((*block)->state == Block::State::committed) return {n_rows_, (*block)->base + (*block)->n};
  return {n_rows_, 0};
}

std::vector<std::tuple<int64_t, int64_t, std::vector<int64_t>>> Ledger::committed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::tuple<int64_t, int64_t, std::vector<int64_t>>> out;
  for (const auto& block : blocks_)
    if (block->state == Block::State::committed) out.emplace_back(block->base, block->n, block->missing);
  return out;
}

void Ledger::check_at_rest(const char* who) const {
  TORCH_CHECK(n_open_ == 0, broken_rule(who, "the capture", "be at rest", "a running backward",
                                        "Call it after backward() returned."));
}

void Ledger::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  check_at_rest("clear");
  blocks_.clear();
  n_rows_ = 0;
  for (const auto& column : columns) column->rows.clear();
}

std::vector<Done> Ledger::failed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return failed_;
}

void Ledger::note_failed(const std::vector<Done>& waited_for, const std::vector<Done>& written) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::erase_if(failed_, [&](const Done& done) {
    return std::find(waited_for.begin(), waited_for.end(), done) != waited_for.end();
  });
  failed_.insert(failed_.end(), written.begin(), written.end());
}

void Ledger::settle() const {
  std::lock_guard<std::mutex> lock(mutex_);
  settle_locked();
}

void Ledger::settle_locked() const {
  if (failed_.empty()) return;
  for (const auto& column : columns)
    if (const at::Tensor rows = column->rows.tensor(); rows.defined() && on_gpu(rows))
      for (const Done& done : failed_) wait_for(done, current_stream(rows.device()));
}

void Ledger::start_trial() {
  std::lock_guard<std::mutex> lock(mutex_);
  check_at_rest("graph_step");
  before_ = blocks_;
  n_rows_before_ = n_rows_;
  for (const auto& column : columns) column->rows.save_counts();
}

void Ledger::stop_trial() {
  std::lock_guard<std::mutex> lock(mutex_);
  blocks_ = std::move(before_);
  n_rows_ = n_rows_before_;
  before_.clear();
  for (const auto& column : columns) column->rows.restore_counts();
}

bool Ledger::recording() const {
  std::lock_guard<std::mutex> lock(mutex_);
  return recording_;
}

void Ledger::start_recording(const at::Device& device) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_at_rest("graph_step");
  TORCH_CHECK(!recording_, broken_rule("graph_step", "the capture", "record one step at a time", "a second one",
                                       "Finish the first."));
  for (const auto& column : columns) column->check_recorded_on(device);
  if (!cursor_.defined()) {
    cursor_ = at::zeros({1}, at::TensorOptions().device(device).dtype(at::kLong));
    TORCH_CHECK(on_gpu(cursor_),
                broken_rule("graph_step", "the device", "be one of CUDA", device, "Run the step itself."));
    launch_advance(cursor_, 0);  // the first launch loads the kernel, which is no work for a recording
  }
  before_.swap(blocks_);  // the recorded rows lie from the cursor on: their base is 0
  n_rows_before_ = std::exchange(n_rows_, 0);
  recording_ = true;
}

Recording Ledger::stop_recording() {
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(recording_, broken_rule("graph_step", "a recording", "have been started", "none", "Start one."));
  blocks_.swap(before_);
  n_rows_ = n_rows_before_;
  const auto recorded = std::move(before_);
  before_.clear();
  recording_ = false;
  Recording out;
  for (const auto& column : columns)
    out.writes.push_back(
        {column, column->rows.take_recorded(), column->rows.tensor(), column->take_recorded_scratch()});
  TORCH_CHECK(recorded.size() == 1 && recorded[0]->state == Block::State::committed,
              broken_rule("graph_step", "step", "run one backward that reaches the points", c10::str(recorded.size()),
                          "Call backward() once in it."));
  out.n_rows = recorded[0]->n;
  out.missing = recorded[0]->missing;
  return out;
}

void Ledger::replay(Recording& recording) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_at_rest("graph_step");
  for (const auto& write : recording.writes)
    TORCH_CHECK(write.column->rows.tensor().is_same(write.rows),
                broken_rule("graph_step", "a recorded step", "find the rows where they were when it was recorded",
                            "others at " + write.column->name, "Record it again: after clear() their shape changed."));
  const int64_t base = check_room("capture", recording.n_rows);
  settle_locked();
  recording.runs_on(current_stream(cursor_.device()));
  if (cursor_stands_ != base) launch_set_cursor(cursor_, base);
  cursor_stands_ = base + recording.n_rows;
  blocks_.push_back(std::make_shared<Block>(Block{.base = base, .n = recording.n_rows, .missing = recording.missing}));
  for (const auto& write : recording.writes) write.column->rows.replayed(write.n);
  commit_locked(*blocks_.back());
}

void Ledger::take_back(const Recording& recording) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!blocks_.empty()) {
    n_rows_ -= blocks_.back()->n;
    blocks_.pop_back();
  }
  for (const auto& write : recording.writes) write.column->rows.replayed(-write.n);
  --n_ended;
  cursor_stands_ = -1;
}

}  // namespace tlfast
