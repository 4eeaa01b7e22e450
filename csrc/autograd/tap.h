// The tap: sits at one point, attaches to the autograd edge of its module's output, and writes the gradients.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include "keeper.h"
#include "plain.h"

namespace tlfast {

class Tap : public std::enable_shared_from_this<Tap> {
 public:
  static std::shared_ptr<Tap> make(std::shared_ptr<Backwards> backwards, const std::string& name,
                                   std::shared_ptr<Keeper> keeper);
  ~Tap();
  Tap(const Tap&) = delete;
  Tap& operator=(const Tap&) = delete;

  // The module is entered. What was counted of its calls is of this run alone.
  void forward_pre();

  // Hook the node that made an output, if nobody else can see that node; `output` must be held by nobody else.
  bool attach_to_node(const at::Tensor& output);

  // Put an identity node behind an output, which sees the gradient through this module alone, and let it lead to
  // `through`, an alias of the output. It leads to the anchor of the run, too.
  // `kept`: what the call keeps of its input. `heard`: whether hooks on saved tensors hear of what it keeps; a
  // checkpoint that runs a forward from before the capture again goes by the order of what it saves, and with one more
  // the model would take our output for a tensor of its own.
  void attach_behind(const at::Tensor& output, const at::Tensor& through, const std::vector<at::Tensor>& kept = {},
                     bool heard = true);

  // Whether the module was entered outside of a backward.
  bool entered() const { return entered_; }

  // Give the keeper the gradient of a call, and its output where the keeper reads that. Needs no GIL, and touches no
  // Python object but through a sink or a change made of one.
  void fire(const Call& call, const at::Tensor& grad, const at::Tensor& output = {},
            const std::vector<at::Tensor>& kept = {});

  // What a call is to keep of its input. In compiled code a tensor may be changed without a new version, so that
  // nothing of it is shared with other modules.
  std::vector<at::Tensor> keep_of_input(const at::Tensor& input, bool compiled = false) const;

  // A module called with a full backward hook, and the gradient that the hook found: it doesn't say of which call.
  void called_with_full_hook();
  void fire_of_full_hook(const at::Tensor& grad);

  // Give the keeper the alias of an output; undefined stands for one that is no tensor.
  void keep_output(const at::Tensor& kept);

  // The tap that compiled code knows by this number, or null when it is gone.
  static std::shared_ptr<Tap> by_number(int64_t number);

  const std::shared_ptr<Backwards> backwards;
  const std::shared_ptr<Keeper> keeper;
  const std::shared_ptr<Point> point;
  const int64_t number;
  // Set before the tap is hooked:
  const char* side = kOutput;            // of its module at which it sits, for errors
  Change convert;                        // made of each gradient, and of an output that is kept, before anything else
  std::function<void(const Seen&)> see;  // what is shown them then

 private:
  friend struct Call;
  Tap(std::shared_ptr<Backwards> backwards, const std::string& name, std::shared_ptr<Keeper> keeper);

  // Whether the module ran without a graph since the last step: calls whose gradients come of another forward, of a
  // reentrant checkpoint, or by a full backward hook, are among none that are counted.
  bool unseen() const { return unseen_since_ == backwards->ledger->n_ended; }

  std::atomic<int64_t> run_{0};          // of which the following is
  std::atomic<int64_t> n_in_flight_{0};  // calls whose gradients may still come
  std::atomic<int64_t> unseen_since_{-1};
  std::atomic<bool> entered_{false};     // whether the module was entered outside of a backward
  std::atomic<int64_t> seen_ended_{-1};  // with full hooks: when the calls in flight were counted from 0
  std::atomic<bool> recomputed_{false};  // and whether the last of them was a recomputation
};

// One forward of one point. Its autograd node owns it; it is gone when that is.
struct Call {
  enum class Of { node, full_hook, compiled };
  explicit Call(std::shared_ptr<Tap> tap, Of of = Of::node);
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // Whether no other call of the point is known that may fire in the backward in which this one fires first: else the
  // gradients of all of them have to be added up. Where another one comes nevertheless, made inside the backward, say,
  // that is an error.
  bool alone() const { return !recomputed && !tap->unseen() && tap->n_in_flight_ <= 1; }

  const std::shared_ptr<Tap> tap;
  const Of of;
  const int64_t run;      // in which it was made: in a later one it fires nothing
  const bool recomputed;  // made inside a backward: of a checkpoint, whose other calls may still come
};

// What waits for gradients in the graph of a value: the leaves, and the nodes that are hooked or whose backward is
// Python code or a tap of a run without an anchor. Nodes that stand for `value` itself are among them.
struct Waiting {
  std::vector<at::Tensor> leaves;
  std::vector<decltype(torch::autograd::Edge::function)> nodes;
};
Waiting waiting_in(const at::Tensor& value);

}  // namespace tlfast
