// Plain memory: what every gradient, mask and destination is made, or must be, before its data is read.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>

namespace tlfast {

// The keys that a dense tensor with memory of its own may have, on any device. A list of what is plain, not of what
// isn't: a kind of tensor that nobody thought of is refused.
inline const uint64_t kPlainKeys =
    (c10::DispatchKeySet(c10::DispatchKey::Dense) | c10::autograd_dispatch_keyset_with_ADInplaceOrView |
     c10::autocast_dispatch_keyset | c10::backend_bitset_mask)
        .raw_repr();

inline bool is_plain(const at::Tensor& tensor) { return !(tensor.key_set().raw_repr() & ~kPlainKeys); }

inline constexpr const char *kGradient = "the gradient", *kOutput = "the output", *kInput = "the input";

// The same memory without a history, as tensor.detach() gives it, at a fifth of its cost.
inline at::Tensor alias_of(const at::Tensor& tensor) {
  if (!is_plain(tensor)) return tensor.detach();
  at::TensorImpl* impl = tensor.unsafeGetTensorImpl();
  return at::Tensor::wrap_tensor_impl(impl->shallow_copy_and_detach(impl->version_counter(), false));
}

// `given`, made plain or refused in the name of `who` by tlfast.backends.plain, with the GIL.
at::Tensor made_plain(const std::string& who, const char* argument, const at::Tensor& given);

// What `given` means as plain strided memory: `given` itself, wherever it is that.
inline at::Tensor plain(const std::string& who, const char* argument, const at::Tensor& given) {
  return is_plain(given) ? given : made_plain(who, argument, given);
}

// An error unless `given` is plain memory, to be written to. Nothing is resolved: a write to the copy would be lost.
void check_destination(const std::string& who, const char* argument, const at::Tensor& given);

// What can be told of an output, or an input, before there is a gradient.
void check_output(const std::string& who, const char* argument, const at::Tensor& output);

}  // namespace tlfast
