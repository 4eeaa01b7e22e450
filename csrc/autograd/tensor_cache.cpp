// Tensor caches: tensors are held, not copied, where all of them is wanted.
#include "tensor_cache.h"

#include <ATen/Functions.h>
#include <torch/csrc/autograd/graph_task.h>

#include "kernel/errors.h"
#include "plain.h"

namespace tlfast {

size_t TensorCache::add(const std::string& name, Change select) {
  Place place;
  place.name = name;
  place.select = std::move(select);
  places_.push_back(std::move(place));
  return places_.size() - 1;
}

void TensorCache::output(size_t point, const at::Tensor& output) {
  Place& place = places_[point];
  const int64_t generation = generation_;
  const at::Tensor kept = place.select && output.defined() ? place.select(output) : output;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (generation != generation_) return;
  if (!std::exchange(place.has_output, true)) outputs_.push_back(point);
  place.output = kept;
}

void TensorCache::gradient(size_t point, const at::Tensor& grad, bool sum, bool alone) {
  Place& place = places_[point];
  // The tensor itself is held: autograd adds to a buffer, or lets a leaf have it, only if nobody else holds it.
  const at::Tensor given = grad.requires_grad() ? grad.detach() : grad;
  const int64_t task = torch::autograd::get_current_graph_task_id();
  bool first, selects;
  int64_t generation;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    generation = generation_;
    if (!place.clash.empty()) return;
    first = !place.has_gradient;
    if (alone && (first || place.task != task)) sum = false;  // the first of its backward, and the only one
    selects = place.select && !sum;
    if (sum && !first && !place.summed && place.select) {  // what was selected can't be added to
      place.clash = broken_rule("capture at " + place.name, "a point", "make no call inside a backward that reaches it",
                                "another one after the first gradient", "Choose calls=\"last\".");
      place.gradient = at::Tensor();
      return;
    }
  }
  const at::Tensor kept = selects ? place.select(given) : given;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (generation != generation_ || !place.clash.empty()) return;
  if (!std::exchange(place.has_gradient, true)) gradients_.push_back(point);
  place.summed = sum;
  place.task = task;
  place.dtype = given.scalar_type();
  if (sum && on_gpu(given)) {
    const c10::Stream here = current_stream(given.device());
    if (!first && place.stream && here != *place.stream && place.gradient.defined()) {
      wait_for(done_by_now(*place.stream), here);
      read_on(here, place.gradient);
    }
    place.stream = here;
  }
  if (first || !sum) {
    place.gradient = kept;
    return;
  }
  if (place.gradient.sizes() != given.sizes()) {  // which add would broadcast
    place.clash = broken_rule("capture at " + place.name, "a point",
                              "have one shape in all calls to be summed (" + list_of(place.gradient.sizes()) + ")",
                              list_of(given.sizes()), "Choose calls=\"last\".");
    place.gradient = at::Tensor();
    return;
  }
  place.gradient = at::add(place.gradient.to(accumulator(place.dtype)), given);
}

size_t TensorCache::n_outputs() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  return outputs_.size();
}

void TensorCache::clear() {
  std::vector<at::Tensor> held;  // let go of behind the lock: what they are the last of may run whatever it runs
  const std::lock_guard<std::mutex> lock(mutex_);
  ++generation_;
  for (Place& place : places_) {
    held.insert(held.end(), {std::move(place.output), std::move(place.gradient)});
    place.output = place.gradient = at::Tensor();
    place.has_output = place.has_gradient = place.summed = false;
    place.clash.clear();
    place.task = -1;
    place.stream.reset();
  }
  outputs_.clear();
  gradients_.clear();
}

TensorCache::Kept TensorCache::outputs() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Kept kept;
  for (const size_t point : outputs_) kept.emplace_back(point, places_[point].output);
  return kept;
}

TensorCache::Kept TensorCache::gradients() const {
  Kept kept;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    // Of its own, or points that share a gradient would share a tensor.
    for (const size_t point : gradients_)
      if (places_[point].clash.empty()) kept.emplace_back(point, alias_of(places_[point].gradient));
  }
  for (auto& [point, gradient] : kept) {
    const Place& place = places_[point];
    if (!place.summed) continue;
    gradient = gradient.to(place.dtype);
    if (place.select) gradient = place.select(gradient);
  }
  return kept;
}

std::vector<std::pair<size_t, std::string>> TensorCache::clashes() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::pair<size_t, std::string>> found;
  for (const size_t point : gradients_)
    if (!places_[point].clash.empty()) found.emplace_back(point, places_[point].clash);
  return found;
}

}  // namespace tlfast
