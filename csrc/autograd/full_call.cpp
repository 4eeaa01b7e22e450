// The nodes of a module with full backward hooks.
#include "full_call.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <utility>

#include "kernel/errors.h"
#include "tap.h"

namespace tlfast {
namespace {

namespace autograd = torch::autograd;
using autograd::Node;
using autograd::variable_list;

struct HookNode : Node {
  HookNode(std::shared_ptr<FullCall> call, FullNode::Side side) : call(std::move(call)), side(side) {}

  variable_list apply(variable_list&& grads) override {
    if (side == FullNode::Side::outputs) {
      call->at_outputs(grads, [&] { return filled(grads); });
    } else {
      grads = filled(std::move(grads));
      call->at_inputs(grads);
    }
    return std::move(grads);
  }

  // Zeros in place of nothing, also for a tensor that requires no grad: so PyTorch's own node has it.
  variable_list filled(variable_list grads) const {
    at::OptionalDeviceGuard guard;
    for (uint32_t i = 0, number = 0; i < grads.size(); ++i) {
      const bool no_grad = input_metadata(i).was_default_constructed();
      const auto* const zeros = no_grad ? &without_grad[number++] : nullptr;
      if (!grads[i].defined()) grads[i] = zeros ? (*zeros).zeros(guard) : input_metadata(i).zeros_like();
    }
    return grads;
  }

  // As PyTorch's own is called: programs and error texts know that name.
  std::string name() const override { return "BackwardHookFunctionBackward"; }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK(false, broken_rule("register_full_backward_hook", "the backward", "run in the eager engine",
                                   "compiled autograd", "Turn it on before the forward, too, or leave it off."));
  }

  const std::shared_ptr<FullCall> call;
  const FullNode::Side side;
  std::vector<autograd::VariableInfo> without_grad;  // the tensors that require none
};

template <class Pointer = decltype(autograd::Edge::function)>
Pointer make_node(std::shared_ptr<FullCall> call, FullNode::Side side) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return Pointer(new HookNode(std::move(call), side), [](auto* node) { deleteNode(node); });
  else
    return c10::make_intrusive<HookNode>(std::move(call), side);
}

}  // namespace

FullNode::FullNode(std::shared_ptr<FullCall> call, Side side, const variable_list& tensors)
    : node_(make_node(std::move(call), side)) {
  node_->set_next_edges(autograd::collect_next_edges(tensors));
}

void FullNode::add(const at::Tensor& tensor, const at::Tensor& through) {
  if (!through.defined()) static_cast<HookNode&>(*node_).without_grad.emplace_back(tensor);
  autograd::set_history(through, node_);
}

void forbid_in_place(const at::Tensor& given, const at::Tensor& alias, bool of_several) {
  using autograd::CreationMeta;
  if (alias.unsafeGetTensorImpl()->autograd_meta()) return;  // made by a class of its own, which knows what it made
  autograd::as_view(given, alias, /*is_bw_differentiable=*/true, /*is_fw_differentiable=*/true,
                    /*view_func=*/nullptr, /*rev_view_func=*/nullptr,
                    of_several ? CreationMeta::MULTI_OUTPUT_NODE : CreationMeta::IN_CUSTOM_FUNCTION);
}

void forbid_in_place_from_now(const at::Tensor& given, const at::Tensor& alias, bool of_several) {
  const autograd::Edge edge = autograd::impl::gradient_edge(alias);
  if (alias.is_view() || !alias.grad_fn()) return;
  auto* const old = autograd::impl::get_autograd_meta(alias);
  auto hooks = std::move(old->hooks_);
  auto hooks_list = std::move(old->cpp_hooks_list_);
  const auto retains_grad = old->retains_grad_;
  const at::Tensor grad = old->grad_;
  alias.unsafeGetTensorImpl()->set_autograd_meta(nullptr);
  forbid_in_place(given, alias, of_several);
  autograd::impl::set_gradient_edge(alias, edge);
  auto* const made = autograd::impl::get_autograd_meta(alias);
  made->hooks_ = std::move(hooks);
  made->cpp_hooks_list_ = std::move(hooks_list);
  made->retains_grad_ = retains_grad;
  made->grad_ = grad;
}

}  // namespace tlfast
