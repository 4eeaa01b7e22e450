// Taps: from the autograd edge to the rows.
#include "tap.h"

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/library.h>

#include <string_view>
#include <typeinfo>
#include <unordered_map>
#include <unordered_set>

#include "kernel/errors.h"

namespace tlfast {
namespace {

namespace autograd = torch::autograd;
using autograd::Node;
using autograd::variable_list;

[[noreturn]] void refuse_compiled_autograd() {
  TORCH_CHECK(false,
              broken_rule("capture", "the backward", "run in the eager engine", "compiled autograd", "Turn it off."));
}

// On the grad_fn of a fresh output.
struct PreHook : autograd::FunctionPreHook {
  PreHook(std::shared_ptr<Tap> tap, uint32_t output_nr) : call(std::move(tap)), output_nr(output_nr) {}
  variable_list operator()(const variable_list& grads) override {
    const at::Tensor& grad = grads[output_nr];
    if (grad.defined())
      call.tap->fire(call, grad);
    else if (call.tap->backwards->active)
      call.tap->fire(call, autograd::get_current_node()->input_metadata(output_nr).zeros_like());
    return grads;
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override { refuse_compiled_autograd(); }
  Call call;
  uint32_t output_nr;
};

// An identity whose backward fires the tap: the gradient through this module alone.
struct IdentityNode : Node {
  explicit IdentityNode(std::shared_ptr<Tap> tap) : call(std::move(tap)) {}
  variable_list apply(variable_list&& grads) override {
    Tap& tap = *call.tap;
    if (grads[0].defined())
      tap.fire(call, grads[0], kept(), kept_of_input());
    else if (tap.keeper->keeps_outputs())  // as a full backward hook, which is given no gradient, and passes zeros on
      grads[0] = input_metadata(0).zeros_like();
    else if (tap.backwards->active)
      tap.fire(call, input_metadata(0).zeros_like(), kept(), kept_of_input());
    grads.resize(num_outputs());  // nothing for the anchor
    return std::move(grads);
  }
  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    output.reset_data();
    for (auto& saved : of_input) saved.reset_data();
  }
  std::string name() const override { return "TlfastIdentity"; }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override { refuse_compiled_autograd(); }
  Call call;

  // What the call keeps for the backward, as autograd keeps what a formula needs: in place it may not be changed until
  // then, and it goes with the graph.
  autograd::SavedVariable output;
  std::vector<autograd::SavedVariable> of_input;

 private:
  // The output of the call; undefined where none was kept, or nobody asks for it any more.
  at::Tensor kept() {
    if (!call.tap->keeper->reads_outputs() || !call.tap->backwards->active) return {};
    std::lock_guard<std::mutex> lock(mutex_);
    return output.unpack();
  }
  std::vector<at::Tensor> kept_of_input() {
    std::vector<at::Tensor> kept;
    if (of_input.empty() || !call.tap->backwards->active) return kept;
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& saved : of_input) kept.push_back(saved.unpack());
    return kept;
  }
};

// Hooks on saved tensors hear of nothing that is saved meanwhile, in this thread.
class Unheard {
 public:
  explicit Unheard(bool unheard)
      : unheard_(unheard), before_(unheard && at::SavedTensorDefaultHooks::set_tracing(true)) {}
  ~Unheard() {
    if (unheard_) at::SavedTensorDefaultHooks::set_tracing(before_);
  }
  Unheard(const Unheard&) = delete;
  Unheard& operator=(const Unheard&) = delete;

 private:
  const bool unheard_, before_;
};

// autograd::Edge holds its node by shared_ptr up to torch 2.11 and by intrusive_ptr in 2.13.
template <class Pointer = decltype(autograd::Edge::function)>
Pointer made_identity(IdentityNode* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return Pointer(node, [](auto* made) { deleteNode(made); });
  else
    return Pointer::unsafe_steal_from_new(node);
}

// Whether running a node can be seen from outside.
bool is_seen(Node& node) {
  if (!node.pre_hooks().empty() || !node.tensor_pre_hooks().empty() || !node.post_hooks().empty() ||
      !node.retains_grad_hooks().empty())
    return true;
  if (const auto* identity = dynamic_cast<IdentityNode*>(&node))
    return !identity->call.tap->backwards->anchor.defined();
  // By its name: libtorch_python doesn't export the type.
  static const std::string_view written_in_python = "N5torch8autograd6PyNodeE";
  return typeid(node).name() == written_in_python;
}

// The rows of a step are reserved by the shape of its gradients, and hooks on saved tensors may return anything.
void check_kept(const std::string& who, const char* side, const at::Tensor& act, const at::Tensor& grad) {
  const auto kind = [](const at::Tensor& tensor) { return c10::str(list_of(tensor.sizes()), " on ", tensor.device()); };
  TORCH_CHECK_VALUE(act.sizes() == grad.sizes() && act.device() == grad.device(),
                    broken_rule(who, c10::str(side, " that was kept"), "be as its gradient is, " + kind(grad),
                                kind(act), "Let the hooks on saved tensors give back what they were given."));
}

// Taps by number, for compiled code.
std::mutex registry_mutex;
std::unordered_map<int64_t, std::weak_ptr<Tap>>& registry() {
  static auto* taps = new std::unordered_map<int64_t, std::weak_ptr<Tap>>();
  return *taps;
}
std::atomic<int64_t> next_number{0};

void fire_op(at::Tensor, const at::Tensor& grad, int64_t number, const std::optional<at::Tensor>& output,
             const std::optional<at::Tensor>& input) {
  const auto tap = Tap::by_number(number);
  if (!tap) return;
  std::vector<at::Tensor> kept;
  if (input && tap->backwards->active) kept = tap->keep_of_input(*input, /*compiled=*/true);
  tap->fire(Call(tap, Call::Of::compiled), grad, output.value_or(at::Tensor()), kept);
}

}  // namespace

Tap::Tap(std::shared_ptr<Backwards> backwards_, const std::string& name, std::shared_ptr<Keeper> keeper_)
    : backwards(std::move(backwards_)),
      keeper(std::move(keeper_)),
      point(new Point{name, "capture at " + name, keeper->columns(), backwards->points.size()}),
      number(next_number++) {
  backwards->add(point);
}

std::shared_ptr<Tap> Tap::make(std::shared_ptr<Backwards> backwards, const std::string& name,
                               std::shared_ptr<Keeper> keeper) {
  std::shared_ptr<Tap> tap(new Tap(std::move(backwards), name, std::move(keeper)));
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry()[tap->number] = tap;
  return tap;
}

Tap::~Tap() {
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry().erase(number);
}

std::shared_ptr<Tap> Tap::by_number(int64_t number) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry().find(number);
  return found == registry().end() ? nullptr : found->second.lock();
}

Call::Call(std::shared_ptr<Tap> tap_, Of of)
    : tap(std::move(tap_)),
      of(of),
      run(tap->backwards->run),
      recomputed(of == Of::compiled ||
                 (of == Of::full_hook ? tap->recomputed_.load() : autograd::get_current_graph_task_id() != -1)) {
  if (of == Of::node) ++tap->n_in_flight_;
}

Call::~Call() {
  if (of == Of::node && run == tap->run_) --tap->n_in_flight_;
}

void Tap::forward_pre() {
  if (!backwards->active) return;
  if (run_.exchange(backwards->run) != backwards->run) {
    n_in_flight_ = 0;
    unseen_since_ = -1;
    entered_ = false;
  }
  backwards->enter_forward();
  if (autograd::get_current_graph_task_id() == -1) entered_ = true;
  point->last_call = ++backwards->n_calls;
  if (!at::GradMode::is_enabled()) unseen_since_ = backwards->ledger->n_ended.load();
}

void Tap::called_with_full_hook() {
  const int64_t ended = backwards->ledger->n_ended;
  if (seen_ended_.exchange(ended) != ended) n_in_flight_ = 0;
  ++n_in_flight_;
  recomputed_ = autograd::get_current_graph_task_id() != -1;
}

void Tap::fire_of_full_hook(const at::Tensor& grad) { fire(Call(shared_from_this(), Call::Of::full_hook), grad); }

bool Tap::attach_to_node(const at::Tensor& output) {
  const auto& node = output.grad_fn();
  // An output that is a view loses its node to an in-place operation. A hook put on the node by the module itself may
  // change the gradient, and belongs before the point, not behind it.
  if (!node || output.is_view() || !node->tensor_pre_hooks().empty()) return false;
  for (const auto& hook : node->pre_hooks())
    if (!dynamic_cast<PreHook*>(hook.get())) return false;
  node->add_pre_hook(std::make_unique<PreHook>(shared_from_this(), output.output_nr()));
  return true;
}

std::vector<at::Tensor> Tap::keep_of_input(const at::Tensor& input, bool compiled) const {
  return keeper->keep_of_input(point->who, plain(point->who, kInput, input), compiled ? nullptr : backwards.get());
}

void Tap::attach_behind(const at::Tensor& output, const at::Tensor& through, const std::vector<at::Tensor>& kept,
                        bool heard) {
  auto* const made = new IdentityNode(shared_from_this());
  auto node = made_identity(made);
  {
    const Unheard unheard(!heard);
    // Without its history: of an output that is changed in place later, by `through`, this node is a part of that.
    if (keeper->reads_outputs()) made->output = autograd::SavedVariable(alias_of(output), /*is_output=*/false);
    for (const at::Tensor& tensor : kept) made->of_input.emplace_back(alias_of(tensor), /*is_output=*/false);
  }
  const at::Tensor& anchor = backwards->anchor;
  node->set_next_edges(anchor.defined() ? autograd::collect_next_edges(output, anchor)
                                        : autograd::collect_next_edges(output));
  autograd::set_history(through, node);
  // The tangent of forward-mode AD goes through, as it does through any identity.
  const at::Tensor& tangent = output._fw_grad(/*level=*/0);
  if (tangent.defined()) through._set_fw_grad(tangent, /*level=*/0, /*is_inplace_op=*/false);
}

void Tap::keep_output(const at::Tensor& kept) {
  if (!backwards->active) return;
  keeper->output(convert && kept.defined() ? convert(kept) : kept);
}

void Tap::fire(const Call& call, const at::Tensor& given, const at::Tensor& output,
               const std::vector<at::Tensor>& kept) {
  if (!backwards->active || call.run != backwards->run) return;
  const auto taken = [&](const char* what, const at::Tensor& tensor) {
    const at::Tensor found = plain(point->who, what, tensor);
    return convert ? plain(point->who, what, convert(found)) : found;
  };
  const at::Tensor grad = taken(kGradient, given);
  const at::Tensor act = output.defined() ? taken(side, output) : at::Tensor();
  if (act.defined()) check_kept(point->who, side, act, grad);
  const Seen seen{.grad = grad, .act = act, .kept = &kept};
  if (see) see(seen);
  keeper->gradient(call, seen);
}

Waiting waiting_in(const at::Tensor& value) {
  Waiting waiting;
  std::unordered_set<Node*> known;
  std::vector<decltype(autograd::Edge::function)> open;
  const auto reach = [&](const auto& node) {
    if (node && known.insert(node.get()).second) open.push_back(node);
  };
  reach(value.grad_fn());
  while (!open.empty()) {
    const auto node = std::move(open.back());
    open.pop_back();
    if (const auto* leaf = dynamic_cast<autograd::AccumulateGrad*>(node.get())) {
      waiting.leaves.push_back(leaf->variable);
      continue;
    }
    for (const auto& edge : node->next_edges()) reach(edge.function);
    if (is_seen(*node)) waiting.nodes.push_back(node);
  }
  return waiting;
}

TORCH_LIBRARY_FRAGMENT(tlfast, library) {
  library.def("fire(Tensor(a!) token, Tensor grad, int number, Tensor? output=None, Tensor? input=None) -> ()",
              {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(tlfast, CompositeExplicitAutograd, library) { library.impl("fire", fire_op); }

}  // namespace tlfast
