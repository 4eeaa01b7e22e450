// What a column computes of a gradient.
#include "recipe.h"

#include <ATen/TensorIndexing.h>
#include <ATen/core/List.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index.h>

#include <algorithm>
#include <array>
#include <utility>

#include "kernel/errors.h"

namespace tlfast {
namespace {

// A position as a number from 0 on; an error, which says of which example it is (-1: of all), where there is none.
int64_t position_of(const std::string& who, int64_t wanted, const at::Tensor& tensor, int64_t example) {
  const int64_t n = tensor.size(1);
  TORCH_CHECK_VALUE(
      -n <= wanted && wanted < n,
      broken_rule(who, "at", c10::str("be positions of dimension 1 of a gradient of shape ", list_of(tensor.sizes())),
                  example < 0 ? c10::str(wanted) : c10::str(wanted, " for example ", example),
                  "Check them: the last one is -1."));
  return wanted < 0 ? wanted + n : wanted;
}

}  // namespace

Of parse_of(const std::string& name) {
  static constexpr std::array kNames{"grad", "act", "grad*act", "grad*ref", "weight"};  // in the order of Of
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return Of(i);
  const std::string rule = c10::str("be one of ", c10::Join(", ", kNames));
  TORCH_CHECK_VALUE(false, broken_rule("capture", "of", rule, "'" + name + "'", "Check the spelling."));
}

Recipe::Recipe(std::string who, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype,
               Of of, Form form, std::shared_ptr<const Weight> weight_)
    : of(of),
      weight(std::move(weight_)),
      who_(std::move(who)),
      reduction_(reduction),
      dims_(std::move(dims)),
      dtype_(dtype),
      form_(std::move(form)) {
  if (of == Of::with_act || of == Of::with_ref) check_reduces_products(who_, reduction);
  const bool fits = (of == Of::weight) == bool(weight);
  TORCH_CHECK_VALUE(fits && (!weight || (reduction == Reduction::none && !form_.heads && !form_.at)),
                    broken_rule(who_, "of", "be \"weight\" with a weight, alone", weight ? "one" : "none",
                                "Make the column of one of both."));
}

Read Recipe::read(const Seen& seen, const Given& given) const {
  if (weight) return {weight->rows(who_, seen.act, seen.grad, given.mask, given.scale), {}, {}};
  Read read{of == Of::act ? seen.act : seen.grad, {}, given.mask};
  if (of == Of::with_act) read.ref = seen.act;
  if (of == Of::with_ref) read.ref = spread(given.ref, seen.grad);
  const bool by_mask = form_.at && form_.at->empty() && !given.at && given.own_mask;
  if (form_.at && !by_mask) choose(read, given);
  if (form_.heads) {
    read.tensor = in_heads(read.tensor);
    if (read.ref) read.ref = in_heads(*read.ref);
  }
  return read;
}

// What the step gives to multiply with, in the sizes of the gradient.
at::Tensor Recipe::spread(const std::optional<at::Tensor>& ref, const at::Tensor& grad) const {
  TORCH_CHECK_VALUE(ref, broken_rule(who_, "ref", "be given for each step", "none",
                                     "Say cap.batch(refs={...}) around forward and backward, or Spec(ref=...)."));
  const int64_t n = ref->dim(), more = grad.dim() - n;
  bool fits = more >= 0;
  for (int64_t d = 0; fits && d < n; ++d) fits = ref->size(d) == 1 || ref->size(d) == grad.size(d + more);
  TORCH_CHECK_VALUE(fits,
                    broken_rule(who_, "ref", c10::str("broadcast to a gradient of shape ", list_of(grad.sizes())),
                                list_of(ref->sizes()), "Give it the gradient's sizes, 1 for those it doesn't have."));
  TORCH_CHECK_VALUE(
      ref->device() == grad.device(),
      broken_rule(who_, "ref", c10::str("be on ", grad.device(), ", as grad is"), ref->device(), "Move one of them."));
  return ref->expand(grad.sizes());
}

// Read the chosen positions alone: a view where all examples have the same one, else a copy of them.
void Recipe::choose(Read& read, const Given& given) const {
  const at::Tensor whole = read.tensor;
  TORCH_CHECK_VALUE(whole.dim() > 1, broken_rule(who_, "a gradient", "have positions as dimension 1",
                                                 list_of(whole.sizes()), "Leave at= out."));
  if (read.mask) check_mask(who_, *std::exchange(read.mask, std::nullopt), whole);
  read.one = given.at ? given.at->dim() == 1 : form_.one;
  if (!given.at) {
    TORCH_CHECK_VALUE(!form_.at->empty(), broken_rule(who_, "at", "be given for each step", "none",
                                                      "Say cap.batch(at={...}) around forward and backward."));
    const auto chosen = [&](const at::Tensor& of) {
      std::vector<at::Tensor> parts;
      for (const int64_t wanted : *form_.at) parts.push_back(of.narrow(1, position_of(who_, wanted, whole, -1), 1));
      return parts.size() == 1 ? parts[0] : at::cat(parts, 1);
    };
    read.tensor = chosen(whole);
    if (read.ref) read.ref = chosen(*read.ref);
    return;
  }
  const int64_t n = whole.size(0);
  TORCH_CHECK_VALUE(given.at->size(0) == n, broken_rule(who_, "at", c10::str("have positions for ", n, " examples"),
                                                        given.at->size(0), "Give those of this very batch."));
  at::Tensor index = given.at->reshape({n, read.one ? 1 : given.at->size(1)})
                         .to(at::kCPU, at::kLong, /*non_blocking=*/false, /*copy=*/true)
                         .contiguous();
  auto* const numbers = index.mutable_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.numel(); ++i) numbers[i] = position_of(who_, numbers[i], whole, i / index.size(1));
  index = index.to(whole.device());
  const at::Tensor rows = at::arange(n, index.options()).unsqueeze(1);
  const c10::List<std::optional<at::Tensor>> both({rows, index});
  read.tensor = at::index(whole, both);
  if (read.ref) read.ref = at::index(*read.ref, both);
}

at::Tensor Recipe::in_heads(const at::Tensor& tensor) const {
  const auto [n, d] = *form_.heads;
  const int64_t size = tensor.dim() ? tensor.size(-1) : 0;
  TORCH_CHECK_VALUE(size == n * d,
                    broken_rule(who_, "heads", c10::str("be (n, d) with n * d the last dimension, ", size),
                                c10::str("(", n, ", ", d, ")"), "Check the point, and the model's number of heads."));
  return tensor.unflatten(-1, {n, d});
}

std::vector<int64_t> Recipe::dims_of(const Read& read) const {
  auto dims = normal_dims(who_, dims_, read.tensor.dim());
  if (read.one && std::find(dims.begin(), dims.end(), 1) == dims.end()) {
    dims.push_back(1);
    std::sort(dims.begin(), dims.end());
  }
  return dims;
}

bool Recipe::keeps_batch(int64_t n_dims) const {
  bool keeps = n_dims > 0;
  for (int64_t d : dims_) {
    if (d < -n_dims || d >= n_dims) normal_dims(who_, dims_, n_dims);  // throws
    keeps &= d != 0 && d != -n_dims;
  }
  return keeps;
}

std::vector<int64_t> Recipe::row_shape(const Read& read) const {
  auto left = reduced_shape(read.tensor.sizes(), dims_of(read));
  if (keeps_batch(read.tensor.dim())) left.erase(left.begin());
  return left;
}

at::Tensor Recipe::first_of(const at::Tensor& rows, const Read& read) const {
  return keeps_batch(read.tensor.dim()) ? rows.narrow(0, 0, read.tensor.size(0)) : rows.select(0, 0);
}

Plan Recipe::plan(const at::Tensor& out, const Read& read) const {
  // The one position of an example is the last one.
  const Reduction reduction = read.one && reduction_ == Reduction::none ? Reduction::last : reduction_;
  return make_plan(who_, out, read.tensor, reduction, dims_of(read), read.mask, read.ref);
}

at::Tensor Recipe::empty_for(const Read& read, at::ScalarType dtype) const {
  return at::empty(reduced_shape(read.tensor.sizes(), dims_of(read)), read.tensor.options().dtype(dtype));
}

}  // namespace tlfast
