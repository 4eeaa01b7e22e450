// Preallocated rows: their memory, what was written there, and on which streams.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <mutex>
#include <string>
#include <vector>

#include "capture.h"
#include "device.h"

namespace tlfast {

// Where the rows of a backward begin: at `base`, or, in one that is recorded, where the cursor on the device stands
// then.
struct Place {
  int64_t base;
  int64_t* cursor = nullptr;
};

class Rows {
 public:
  Rows(std::string who, int64_t capacity) : who_(std::move(who)), capacity_(capacity) {}

  // The rows; allocated as NaN at the first call, an error where a later one asks for another shape.
  at::Tensor fitting(at::IntArrayRef row_shape, at::ScalarType dtype, const at::Tensor& like);

  // Undefined before the first gradient.
  at::Tensor tensor() const;

  // What was learnt of their memory holds as long as this number stays.
  int64_t generation() const { return generation_; }

  // Forget the shape of the rows; the memory stays in use if the next ones fit it.
  void clear();

  // Rows as they are, [n, ...], put into `rows`.
  void put(const Place& place, const at::Tensor& rows, const at::Tensor& values);

  // Mark rows as never written.
  void fill_nan(const Place& place, int64_t n);

  // Tell the allocator that a stream of a GPU uses the rows, which are memory of the stream that filled them.
  void used_on(const c10::Stream& stream);

  // Rows and counters were filled on the stream of the first gradient; the stream of another backward comes after that.
  void come_after_filling(const Place& place, const c10::Stream& stream) const;

  // int64 [kCounters], see there; of rows on a GPU it lies there, and is what the kernels add to.
  at::Tensor counters() const;
  int64_t* device_counters(const Place& place, const at::Tensor& like);
  void count(const Counts& counts);

  // The same on the host; waits for a GPU, and is an error if a write that was launched has not been done.
  Counts counted() const;

  // Remember the counts, and go back to them, in the order of the current stream.
  void save_counts();
  void restore_counts();

  // A write on a GPU was launched; those that were recorded, not done, since the last call of `take_recorded`.
  void launched(const Place& place) { ++(place.cursor ? n_recorded_ : n_writes_); }
  int64_t take_recorded() { return n_recorded_.exchange(0); }
  void replayed(int64_t n_writes);
  int64_t n_writes() const { return n_writes_; }  // as many as were launched; only those of a GPU are counted

 private:
  const std::string who_;
  const int64_t capacity_;
  mutable std::mutex mutex_;              // two backwards may meet at the first gradient
  at::Tensor rows_, counters_, saved_;    // counters_: of rows on a GPU
  Done rows_filled_, counters_filled_;    // on the stream of the first gradient
  std::optional<c10::Stream> filled_on_;  // of rows on a GPU: that stream,
  std::vector<c10::Stream> used_on_;      // and the others that the allocator knows of
  bool reshapable_ = false;               // nothing was written since `clear`
  int64_t saved_writes_ = 0;
  std::atomic<int64_t> generation_{0}, n_nonfinite_{0}, n_saturated_{0}, n_writes_{0}, n_recorded_{0};
};

}  // namespace tlfast
