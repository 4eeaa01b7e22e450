// The ledger of a capture: which rows are reserved, which are committed, and what a recorded step does to them.
#pragma once

#include <memory>
#include <tuple>

#include "column.h"

namespace tlfast {

// The rows of one backward: reserved at its first gradient, counted once it has ended well.
struct Block {
  enum class State { open, committed, aborted };
  int64_t base, n;
  State state = State::open;
  std::vector<int64_t> missing;
  int64_t* cursor = nullptr;  // of a step that is recorded

  Place place() const { return {base, cursor}; }
};

// What a recorded step does each time it is replayed.
struct Recording {
  int64_t n_rows;
  std::vector<int64_t> missing;
  struct Write {
    std::shared_ptr<Column> column;
    int64_t n;
    at::Tensor rows;                  // where its kernels write
    std::vector<at::Tensor> scratch;  // what they use meanwhile: it goes with the recording
  };
  std::vector<Write> writes;
  std::vector<c10::Stream> replayed_on;  // the allocator knows that these use the scratch

  std::vector<at::Tensor> scratch() const;

  // It is replayed on a stream: its scratch isn't given to others before that is done, also where it goes earlier.
  void runs_on(const c10::Stream& stream);
};

class Ledger {
 public:
  explicit Ledger(int64_t capacity) : capacity_(capacity) {}

  // Reserve rows for a backward; an error in the name of `who` where there is no room.
  std::shared_ptr<Block> reserve(const std::string& who, int64_t n);

  // A backward has ended well, without a gradient at the points `missing`; or it has failed, and its rows are void.
  void commit(Block& block, std::vector<int64_t> missing);
  void abort(Block& block);

  // The rows of all committed blocks, and where the last of them ends: more only where others left holes.
  std::pair<int64_t, int64_t> extent() const;

  // (first row, rows, points that did not fire) of every committed block, in order.
  std::vector<std::tuple<int64_t, int64_t, std::vector<int64_t>>> committed() const;

  // Forget all rows and their shapes; an error while a backward is running.
  void clear();

  // What backwards that failed have begun to write, and nobody has waited for; instead of `waited_for`, which they
  // have.
  std::vector<Done> failed() const;
  void note_failed(const std::vector<Done>& waited_for, const std::vector<Done>& written);

  // Let the current streams of the devices that hold rows wait for it.
  void settle() const;

  // Between these two, one backward is recorded by a CUDA graph: its kernels find their rows by the cursor on the
  // device, and move it on at the end. It makes no rows until it is replayed.
  void start_recording(const at::Device& device);
  Recording stop_recording();
  bool recording() const;
  at::Tensor cursor() const { return cursor_; }

  // Reserve and commit the rows of one replay, which is launched next; `take_back` where that failed.
  void replay(Recording& recording);
  void take_back(const Recording& recording);

  // What runs between these two leaves rows and counts as they were: to warm up what is recorded next.
  void start_trial();
  void stop_trial();

  std::atomic<int64_t> n_ended{0};               // blocks that were ever committed
  std::vector<std::shared_ptr<Column>> columns;  // of all points; filled before the first backward

 private:
  int64_t check_room(const std::string& who, int64_t n) const;
  void check_at_rest(const char* who) const;
  void settle_locked() const;
  void commit_locked(Block& block);

  const int64_t capacity_;
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Block>> blocks_;
  int64_t n_rows_ = 0;        // of the committed ones
  int64_t n_open_ = 0;        // blocks whose backwards run
  std::vector<Done> failed_;  // the work of a backward that failed, whose rows the next one may write

  at::Tensor cursor_;           // int64 [1] on the device: the row at which the next replay begins,
  int64_t cursor_stands_ = -1;  // and where it stands; -1: it must be set
  bool recording_ = false;
  std::vector<std::shared_ptr<Block>> before_;  // the blocks that were there when the recording or the trial began,
  int64_t n_rows_before_ = 0;                   // and their rows
};

}  // namespace tlfast
