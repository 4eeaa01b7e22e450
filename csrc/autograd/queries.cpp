// Scores of weight gradients. The products are ATen's.
#include "queries.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>

#include <algorithm>
#include <utility>

#include "kernel/errors.h"
#include "plain.h"

namespace tlfast {
namespace {

constexpr int64_t kElements = int64_t(1) << 22;  // of what is there at once between two products

}  // namespace

Queries::Queries(std::vector<at::Tensor> given) : given_(std::move(given)) {
  const auto is_good = [](const at::Tensor& tensor) {
    return tensor.defined() && at::isFloatingType(tensor.scalar_type()) && is_plain(tensor) && tensor.numel() > 0;
  };
  bool fits = !given_.empty() && given_.size() <= 2 && std::all_of(given_.begin(), given_.end(), is_good);
  if (fits && pairs()) {
    const at::Tensor &left = given_[0], &right = given_[1];
    fits = left.dim() == 3 && right.dim() == 3 && left.size(0) == right.size(0) && left.size(2) == right.size(1);
  } else if (fits) {
    fits = given_[0].dim() == 2 || given_[0].dim() == 3;
  }
  TORCH_CHECK_VALUE(fits, broken_rule("capture", "queries", "be [Q, O, I], or [Q, O, r] and [Q, r, I]", given_.size(),
                                      "Make them by Spec(queries=)."));
}

// Multiplications for an example of T positions and one of G's values: by whole queries, once G is made or without it.
bool Queries::want_gradients(int64_t n_positions) const {
  if (pairs() && take_pairs(n_positions, /*summed=*/true)) return false;
  return n_positions * size() > n_positions + size();
}

bool Queries::take_pairs(int64_t n_positions, bool summed) const {
  if (!pairs()) return false;
  const double n = double(given_[0].size(1)), m = double(given_[1].size(2)), r = double(given_[0].size(2));
  const double both = double(n_positions) * double(size());
  const double each = summed ? std::min(both, double(n_positions + size())) : both;
  return both * r * (n + m) <= each * n * m;
}

const at::Tensor& Queries::whole() const {
  if (!pairs()) return given_[0];
  std::call_once(once_, [&] {
    const auto dtype = at::promoteTypes(at::kFloat, given_[0].scalar_type());
    product_ = at::bmm(given_[0].to(dtype), given_[1].to(dtype));
  });
  return product_;
}

at::Tensor Queries::of_gradients(const at::Tensor& gradients, int64_t start) const {
  const at::Tensor flat = gradients.flatten(1), all = moved_.like(whole(), flat).flatten(1);
  return at::matmul(flat, all.narrow(1, start * gradients.size(-1), flat.size(1)).t());
}

at::Tensor Queries::of_positions(const at::Tensor& outputs, const at::Tensor& inputs, bool tokens) const {
  const bool pairwise = pairs() && (tokens || take_pairs(outputs.size(1), /*summed=*/false));
  const int64_t each = outputs.size(0) * outputs.size(1) * (pairwise ? given_[0].size(2) : outputs.size(2));
  const int64_t step = std::clamp<int64_t>(kElements / std::max<int64_t>(each, 1), 1, size());
  std::vector<at::Tensor> parts;
  for (int64_t start = 0; start < size(); start += step) {
    const int64_t n = std::min(step, size() - start);
    parts.push_back(pairwise ? by_pairs(outputs, inputs, tokens, start, n)
                             : by_whole(outputs, inputs, tokens, start, n));
  }
  return parts.size() == 1 ? parts[0] : at::cat(parts, -1);
}

// (U^T g) . (V a), [B, T, n]: of factors of a query that are those of its tokens the Gram matrices' product.
at::Tensor Queries::by_pairs(const at::Tensor& outputs, const at::Tensor& inputs, bool tokens, int64_t start,
                             int64_t n) const {
  const at::Tensor left = moved_.like(given_[0], outputs).narrow(0, start, n);
  const at::Tensor right = moved_.like(given_[1], outputs).narrow(0, start, n);
  const int64_t r = left.size(2);
  const at::Tensor of_outputs = at::matmul(outputs, left.transpose(0, 1).flatten(1));
  const at::Tensor of_inputs = tokens ? right.flatten(0, 1).t().index_select(0, inputs.flatten()).view_as(of_outputs)
                                      : at::matmul(inputs, right.flatten(0, 1).t());
  return of_outputs.mul(of_inputs).unflatten(-1, {n, r}).sum(-1);
}

// g . (Q a), [B, T, n].
at::Tensor Queries::by_whole(const at::Tensor& outputs, const at::Tensor& inputs, bool tokens, int64_t start,
                             int64_t n) const {
  const at::Tensor part = moved_.like(whole(), outputs).narrow(0, start, n).flatten(0, 1);  // [n * O, I]
  at::Tensor made =
      tokens ? part.t().index_select(0, inputs.flatten()).unflatten(0, inputs.sizes()) : at::matmul(inputs, part.t());
  return made.unflatten(-1, {n, outputs.size(2)}).mul_(outputs.unsqueeze(2)).sum(-1);
}

}  // namespace tlfast
