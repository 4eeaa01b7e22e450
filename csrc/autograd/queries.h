// Dot products of weight gradients with queries, by the cheapest of three forms. No gradient of an example is kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>
#include <vector>

#include "moved.h"

namespace tlfast {

// Queries of a matrix G [O, I]: whole ones [Q, O, I], or products U V of U [Q, O, r] and V [Q, r, I]; of a vector G [D]
// whole ones [Q, D]. Of G = sum_t g_t a_t^T the score is <G, Q> = sum_t g_t^T Q a_t.
class Queries {
 public:
  explicit Queries(std::vector<at::Tensor> given);

  int64_t size() const { return given_[0].size(0); }

  // Whether G itself is to be made of T positions, since that takes the fewest multiplications.
  bool want_gradients(int64_t n_positions) const;

  // The scores [B, Q] of gradients [B, ...], or what some of their rows from `start` on add to these.
  at::Tensor of_gradients(const at::Tensor& gradients, int64_t start = 0) const;

  // Those of each position [B, T, Q], of outputs [B, T, O] and inputs [B, T, I], or the tokens [B, T] of one-hot ones.
  at::Tensor of_positions(const at::Tensor& outputs, const at::Tensor& inputs, bool tokens) const;

 private:
  bool pairs() const { return given_.size() == 2; }
  bool take_pairs(int64_t n_positions, bool summed) const;
  const at::Tensor& whole() const;
  at::Tensor by_pairs(const at::Tensor& outputs, const at::Tensor& inputs, bool tokens, int64_t start, int64_t n) const;
  at::Tensor by_whole(const at::Tensor& outputs, const at::Tensor& inputs, bool tokens, int64_t start, int64_t n) const;

  const std::vector<at::Tensor> given_;
  const Moved moved_;
  mutable std::once_flag once_;
  mutable at::Tensor product_;  // of the pairs, where these are larger
};

}  // namespace tlfast
