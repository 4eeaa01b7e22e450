// The preallocated rows of one column: allocated at the first gradient, written in place from then on.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <memory>
#include <mutex>

#include "capture.h"

namespace tlfast {

class Ring {
 public:
  Ring(std::string column, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype,
       int64_t capacity);

  // How many rows a gradient of this shape makes: one an example, or one where the batch is reduced.
  int64_t n_rows(at::IntArrayRef shape) const;

  // The rows; allocated as NaN at the first gradient, an error when a later one doesn't fit.
  at::Tensor check(const at::Tensor& grad);

  // Reduce, cast and copy a gradient into the rows from `base` on.
  void write(int64_t base, const at::Tensor& grad, const std::optional<at::Tensor>& mask, double scale);

  // The same into rows of its own, for one of several calls.
  at::Tensor part(const at::Tensor& grad, const std::optional<at::Tensor>& mask, double scale);

  // Write the parts of several calls; they become the first dimension of a row.
  void put_stack(int64_t base, int64_t n, const std::vector<at::Tensor>& parts);

  // Mark rows as never written.
  void fill_nan(int64_t base, int64_t n);

  at::Tensor rows() const;

  const std::string column, who;
  std::atomic<int64_t> n_nonfinite{0}, n_saturated{0};

 private:
  // The last write's geometry: a training loop has the same one at every step.
  struct Known {
    bool fits(const at::Tensor& grad, const std::optional<at::Tensor>& mask) const;

    std::vector<int64_t> sizes, strides, mask_sizes, mask_strides;
    at::ScalarType dtype;
    Plan plan;
    char* rows;
    int64_t row_bytes;
  };

  std::vector<int64_t> dims_of(at::IntArrayRef shape) const;
  void count(const Counts& counts);
  bool keeps_batch(at::IntArrayRef shape) const;
  at::Tensor fitting(at::IntArrayRef row_shape, const at::Tensor& like);

  const Reduction reduction_;
  const std::vector<int64_t> dims_;
  const std::optional<at::ScalarType> dtype_;
  const int64_t capacity_;
  mutable std::mutex mutex_;  // two backwards may meet at the first gradient
  at::Tensor rows_;
  std::shared_ptr<const Known> known_;
};

}  // namespace tlfast
