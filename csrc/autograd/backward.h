// One backward of a capture: its rows, what was said of its batch, and the streams on which it writes.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "ledger.h"

namespace tlfast {

// What a batch says of the backwards that begin in it. It stays as it was for each of these, whatever batch is next.
struct Batch {
  std::optional<StepInput> mask;
  int64_t n_expected = -1;  // examples; -1: unknown
  double scale = 1.0;       // of rows
  std::map<const Column*, OwnInputs> own;
};

// What waits for the end of a backward at one point, where it is called several times.
struct Pending {
  at::Tensor sum;                              // of the gradients, for the columns that keep that
  std::vector<at::Tensor> sums;                // of each column that adds up the rows of its calls
  std::vector<std::vector<at::Tensor>> parts;  // of each column that stacks, those of its calls
  std::vector<at::Tensor> totals;              // of each column whose rows are added to those of other points

  bool adds() const { return sum.defined() || !sums.empty(); }
  bool empty() const { return !adds() && parts.empty() && totals.empty(); }
};

// One outermost backward: those that run inside it (of reentrant checkpoints, or in hooks) are part of it.
struct Backward {
  int64_t root;         // the graph task at whose end the rows are committed
  bool spoilt = false;  // a part of it has failed, and the error was caught
  std::vector<int> fired;
  std::vector<Pending> pending;  // of each point
  std::shared_ptr<Block> block;
  std::shared_ptr<const Batch> batch;

  // What a column is given, whose gradient is on a device.
  Step step_at(const Column& column, const std::optional<at::Tensor>& mask) const;

  // The mask where a gradient is: a model may be spread over several GPUs, each of which has a thread of its own.
  std::optional<at::Tensor> mask_on(const at::Device& device);

  // Note that a gradient is written on a stream of a GPU, after what a backward that failed has begun to write. One of
  // another call of the same point, whose rows or sum it may change, was perhaps written on another stream.
  void write_on(const c10::Stream& stream, bool again, const Ledger& ledger);

  // Let the current streams, those of the caller, wait for all that was written: the engine does so for the streams of
  // the leaves alone. Returns those that had to wait.
  std::vector<c10::Stream> join_streams();

  // Tell the ledger what happens when all is written that was begun and not joined. It is called where nothing may be
  // thrown.
  void give_up(Ledger& ledger) const noexcept;

 private:
  std::mutex copying_;
  std::vector<StepInput> masks_elsewhere_;
  std::vector<c10::Stream> streams_;  // on which gradients were written
  std::vector<Done> waited_;          // what they have come after
};

}  // namespace tlfast
