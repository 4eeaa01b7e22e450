// The tap: sits at one point, attaches to the autograd edge of its module's output, and writes the gradients.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <functional>

#include "step.h"
#include "tensor_cache.h"

namespace tlfast {

using Sink = std::function<void(const at::Tensor&)>;

class Tap : public std::enable_shared_from_this<Tap> {
 public:
  static std::shared_ptr<Tap> make(std::shared_ptr<Step> step, const std::string& name,
                                   std::vector<std::shared_ptr<Ring>> rings, Calls calls);
  ~Tap();
  Tap(const Tap&) = delete;
  Tap& operator=(const Tap&) = delete;

  // The module is entered.
  void forward_pre();

  // Hook the node that made an output, if nobody else can see that node; `output` must be held by nobody else.
  bool attach_to_node(const at::Tensor& output);

  // Put an identity node behind an output, which sees the gradient through this module alone, and let it lead to
  // `through`, an alias of the output. With an anchor, backward(inputs=[anchor]) runs whatever leads to the node, and
  // makes no gradient of a parameter.
  void attach_behind(const at::Tensor& output, const at::Tensor& through);

  // Write one gradient into the rows of the running step, or hand it to the sink. Needs no GIL, and touches no Python
  // object but through a sink or a change made of one.
  void fire(const at::Tensor& grad);

  // Make this tap keep outputs and gradients in a cache.
  void keep_in(std::shared_ptr<TensorCache> cache, Change select);

  // Keep the alias of an output in the cache; undefined stands for one that is no tensor.
  void cache_output(const at::Tensor& kept);

  // The tap that compiled code knows by this number, or null when it is gone.
  static std::shared_ptr<Tap> by_number(int64_t number);

  const std::shared_ptr<Step> step;
  const std::shared_ptr<Point> point;
  const int64_t number;
  // Set before the tap is hooked:
  Sink sink;                           // takes the gradients in place of rows
  Change convert;                      // made of each gradient, and of a cached output, before anything else
  at::Tensor anchor;                   // a leaf to which every identity node leads too: see `attach_behind`
  std::shared_ptr<TensorCache> cache;  // where whole tensors are kept

 private:
  Tap(std::shared_ptr<Step> step, const std::string& name, std::vector<std::shared_ptr<Ring>> rings, Calls calls);
  bool sums() const;

  std::atomic<int64_t> n_called_{0};     // forwards since the last committed step; 0 in compiled code
  std::atomic<bool> recomputed_{false};  // entered inside a backward: a checkpoint, whose other calls may still come
  std::atomic<int64_t> seen_ended_{-1};
  size_t place_ = 0;  // in the cache
};

Calls parse_calls(const std::string& name);

// The same memory without a history, as output.detach() gives it, at a fifth of its cost.
at::Tensor alias_of(const at::Tensor& output);

// What waits for gradients in the graph of a value: the leaves, and the nodes that are hooked or whose backward is
// Python code or a tap without an anchor. Nodes that stand for `value` itself are among them.
struct Waiting {
  std::vector<at::Tensor> leaves;
  std::vector<decltype(torch::autograd::Edge::function)> nodes;
};
Waiting waiting_in(const at::Tensor& value);

}  // namespace tlfast
