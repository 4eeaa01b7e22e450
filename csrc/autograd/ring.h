// The preallocated rows of one column: allocated at the first gradient, written in place from then on.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "capture.h"
#include "device.h"

namespace tlfast {

// Where the rows of a step begin: at `base`, or, in a step that is recorded, where the cursor on the device stands
// then.
struct Place {
  int64_t base;
  int64_t* cursor = nullptr;
};

class Ring {
 public:
  Ring(std::string column, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype,
       int64_t capacity);

  // How many rows a gradient of this shape makes: one an example, or one where the batch is reduced.
  int64_t n_rows(at::IntArrayRef shape) const;

  // The rows; allocated as NaN at the first gradient, an error when a later one doesn't fit.
  at::Tensor check(const at::Tensor& grad);

  // Reduce, cast and copy a gradient into the rows from `place` on.
  void write(const Place& place, const at::Tensor& grad, const std::optional<at::Tensor>& mask_of_step, double scale);

  // The same into rows of its own, for one of several calls.
  at::Tensor part(const Place& place, const at::Tensor& grad, const std::optional<at::Tensor>& mask_of_step,
                  double scale);

  // Write the parts of several calls; they become the first dimension of a row.
  void put_stack(const Place& place, const std::vector<at::Tensor>& parts);

  // Forget the shape of the rows; the memory stays in use if the next ones fit it.
  void clear();

  // Tell the allocator that a stream of a GPU uses the rows, which are memory of the stream that filled them.
  void used_on(const c10::Stream& stream);

  // Mark rows as never written.
  void fill_nan(const Place& place, int64_t n);

  at::Tensor rows() const;

  // int64 [kCounters], see there; of rows on a GPU it lies there, and is what the kernels add to.
  at::Tensor counters() const;

  // The same on the host; waits for a GPU, and is an error if a write that was launched has not been done.
  Counts counted() const;

  // An error where rows lie on another device than the cursor of a recording.
  void check_recorded_on(const at::Device& device) const;

  // Remember the counts, and go back to them, in the order of the current stream.
  void save_counts();
  void restore_counts();

  // Writes that were recorded, not done, since the last call.
  int64_t take_recorded() { return n_recorded_.exchange(0); }
  void replayed(int64_t n_writes);
  int64_t n_writes() const { return n_writes_; }  // as many as were launched; only those of a GPU are counted

  const std::string column, who;
  bool masked = true;  // false: the gradients have no positions, and a step's mask is not about them

 private:
  // What was learnt from a gradient of this geometry. A training loop has the same one at every step, buckets of
  // lengths have a few in turn.
  struct Known {
    bool fits(const at::Tensor& grad, const std::optional<at::Tensor>& mask,
              const std::optional<c10::Stream>& stream) const;

    std::vector<int64_t> sizes, strides, mask_sizes, mask_strides;
    at::ScalarType dtype;
    at::Device device;
    Plan plan;
    char* rows;
    int64_t row_bytes;
    // Of rows on a GPU:
    std::optional<c10::Stream> stream;
    int64_t row_elements;
    at::Tensor scratch;
  };

  std::vector<int64_t> dims_of(at::IntArrayRef shape) const;
  const std::optional<at::Tensor>& own(const std::optional<at::Tensor>& mask) const;
  void count(const Counts& counts);
  void put(const Place& place, const at::Tensor& rows, const at::Tensor& values);
  int64_t* device_counters(const Place& place, const at::Tensor& like);
  void launched(const Place& place) { ++(place.cursor ? n_recorded_ : n_writes_); }
  std::shared_ptr<const Known> recall(const at::Tensor& grad, const std::optional<at::Tensor>& mask,
                                      const std::optional<c10::Stream>& stream) const;
  std::shared_ptr<const Known> learn(const at::Tensor& grad, const std::optional<at::Tensor>& mask, const Place& place,
                                     const std::optional<c10::Stream>& stream);
  void launch(const Known& known, const Place& place, const at::Tensor& grad, const void* mask, double scale);
  void come_after_filling(const Place& place, const c10::Stream& stream) const;
  bool keeps_batch(at::IntArrayRef shape) const;
  void forget_known();
  at::Tensor fitting(at::IntArrayRef row_shape, const at::Tensor& like);

  const Reduction reduction_;
  const std::vector<int64_t> dims_;
  const std::optional<at::ScalarType> dtype_;
  const int64_t capacity_;
  mutable std::mutex mutex_;              // two backwards may meet at the first gradient
  at::Tensor rows_, counters_, saved_;    // counters_: of rows on a GPU
  Done rows_filled_, counters_filled_;    // on the stream of the first gradient
  std::optional<c10::Stream> filled_on_;  // of rows on a GPU: that stream,
  std::vector<c10::Stream> used_on_;      // and the others that the allocator knows of
  std::mutex launching_;                  // held over the launches of a reduction that is split
  bool reshapable_ = false;               // nothing was written since `clear`
  int64_t saved_writes_ = 0;
  static constexpr size_t kGeometries = 8;
  std::vector<std::shared_ptr<const Known>> known_;  // at most that many: a new one takes the place of the oldest
  size_t oldest_known_ = 0;
  std::vector<at::Tensor> recorded_;  // scratch that graphs use for as long as they live
  std::atomic<int64_t> n_nonfinite_{0}, n_saturated_{0}, n_writes_{0}, n_recorded_{0};
};

}  // namespace tlfast
