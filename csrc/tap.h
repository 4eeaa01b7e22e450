// The tap: sits at one point, attaches to the autograd edge of its module's output, and writes the gradients.
#pragma once

#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <thread>

#include "step.h"

namespace tlfast {

class Tap : public std::enable_shared_from_this<Tap> {
 public:
  Tap(std::shared_ptr<Step> step, std::string name, std::vector<std::shared_ptr<Ring>> rings, Calls calls);
  ~Tap();
  Tap(const Tap&) = delete;
  Tap& operator=(const Tap&) = delete;

  // The module is entered: nodes made from here on are its own.
  void forward_pre();

  // Attach to an output that requires grad: a pre-hook on its grad_fn where the output is the module's own, else an
  // identity node behind it, whose output is then to be used instead. `is_input`: the output is one of the inputs.
  std::optional<at::Tensor> attach(const at::Tensor& output, bool is_input);

  // Write one gradient into the rows of the running step. Needs no GIL; touches no Python object.
  void fire(const at::Tensor& grad);

  // The tap that compiled code knows by this number, or null when it is gone.
  static std::shared_ptr<Tap> by_number(int64_t number);

  const std::shared_ptr<Step> step;
  const std::shared_ptr<Point> point;
  const int64_t number;
  std::atomic<int64_t> last_call{0};  // when the module was entered last, counted over the capture

 private:
  bool sums() const;

  std::atomic<int64_t> n_called_{0};  // forwards since the last committed step
  std::atomic<int64_t> seen_ended_{-1};
  uint64_t entry_ = 0;  // autograd's sequence number at entry, of this thread:
  std::thread::id entry_thread_;
};

}  // namespace tlfast
