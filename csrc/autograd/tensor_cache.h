// What the taps of one run keep as whole tensors: the outputs of their modules, and the gradients there.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "column.h"

namespace tlfast {

// What is made of a tensor; an empty one leaves it as it is.
using Change = std::function<at::Tensor(const at::Tensor&)>;

class TensorCache {
 public:
  // Make a place for one point; `select` makes what is kept of a tensor there.
  size_t add(const std::string& name, Change select);

  // Keep an output in place of the one before; undefined stands for an output that is no tensor.
  void output(size_t point, const at::Tensor& output);

  // Keep a gradient in place of the one before; with `sum` add it to that, but where it is `alone` in its backward.
  void gradient(size_t point, const at::Tensor& grad, bool sum, bool alone);

  // (point, tensor) of all that was kept, in the order in which the points came first.
  using Kept = std::vector<std::pair<size_t, at::Tensor>>;
  Kept outputs() const;
  Kept gradients() const;

  // Forget what was kept; the places stay.
  void clear();

  // How many points have had an output so far.
  size_t n_outputs() const;

  // (point, why) of the gradients that couldn't be added up, and are not among those kept: one point fails no other's.
  std::vector<std::pair<size_t, std::string>> clashes() const;

 private:
  struct Place {
    std::string name;
    Change select;
    at::Tensor output, gradient;
    bool has_output = false, has_gradient = false;
    std::string clash;    // why its gradients can't be added up
    bool summed = false;  // the gradient is the sum so far, nothing of which was selected yet
    int64_t task = -1;    // in which the gradient was kept
    at::ScalarType dtype = at::ScalarType::Undefined;  // of the gradients that are summed
    std::optional<c10::Stream> stream;                 // of a GPU, on which the sum was made
  };

  mutable std::mutex
      mutex_;  // autograd may have several threads; not held while Python is called, which has a lock too
  std::vector<Place> places_;                // never moved once there are taps
  std::atomic<int64_t> generation_{0};       // how often it was cleared: what is late by then is nothing to it
  std::vector<size_t> outputs_, gradients_;  // the points, as they came
};

}  // namespace tlfast
