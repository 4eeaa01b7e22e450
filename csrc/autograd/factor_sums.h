// Sums over all examples of what Kronecker factors and second moments are made of: of the rows of a module none is
// kept.
#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace tlfast {

// float64, of what is added up in float32 within a block: float64 sums are added as they are.
class Carried {
 public:
  explicit Carried(const at::Tensor& zeros);
  void carry();
  at::Tensor total() const { return carried_.add(block); }

  at::Tensor block;  // to be added to in place

 private:
  at::Tensor carried_;
};

// The sum over rows x [D] of x x^T. What lies below its diagonal isn't computed.
class ProductSum {
 public:
  void add(const at::Tensor& rows);  // [n, D]
  at::Tensor total() const;          // [D, D]; undefined without a row

 private:
  std::vector<Carried> panels_;  // of rows of the sum, each from its first one's place on the diagonal on
  int64_t size_ = 0, n_rows_ = 0;
};

// The sum over examples of the square, at each place, of sum_t g_t a_t^T [O, I]: no two of these are there at once.
class SquareSum {
 public:
  void add(const at::Tensor& outputs, const at::Tensor& inputs);  // [B, T, O], [B, T, I]
  at::Tensor total() const { return sum_ ? sum_->total() : at::Tensor(); }

 private:
  std::optional<Carried> sum_;
  int64_t n_rows_ = 0;
};

// What a module's sums are of: the products of its inputs, and of its gradients, or the squares of weight gradients.
class FactorSums {
 public:
  explicit FactorSums(const std::string& kind);

  // Adds what one call has at each position, [B, T, O] and [B, T, I], where padding is zero already; with `one`, a 1
  // behind the inputs of each position that isn't left out. Returns how many of these each example has, [B].
  at::Tensor add(const at::Tensor& outputs, const at::Tensor& inputs, bool one,
                 const std::optional<at::Tensor>& left_out, double scale);

  // The sums by now, float64: of products those of inputs and of outputs, of squares one. None before the first call.
  std::vector<at::Tensor> totals() const;

 private:
  const bool squares_;
  mutable std::mutex mutex_;
  ProductSum inputs_, outputs_;
  SquareSum square_;
};

}  // namespace tlfast
