// Sums over all examples: products are ATen's, and go to float64 from time to time.
#include "factor_sums.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>

#include "kernel/errors.h"

namespace tlfast {
namespace {

constexpr int64_t kBlock = 4096;        // rows that are added up in float32
constexpr int64_t kTile = 1 << 16;      // numbers of a gradient that are made at once on the CPU: these stay in a cache
constexpr int64_t kAtOnce = 1LL << 25;  // and elsewhere, of several examples

// Rows of a sum of products that are made at once: as many as keep a product of matrices fast, and no more, since half
// of what is made on the diagonal is of no use.
int64_t panel_of(int64_t size) { return size > 1024 ? 256 : 128; }

}  // namespace

Carried::Carried(const at::Tensor& zeros)
    : block(zeros), carried_(at::zeros_like(zeros, zeros.options().dtype(at::kDouble))) {}

void Carried::carry() {
  if (!block.is_cpu() || block.scalar_type() != at::kFloat) {
    carried_.add_(block);
    block.zero_();
    return;
  }
  auto* const to = carried_.mutable_data_ptr<double>();  // in one pass, where ATen would make a copy in float64 first
  auto* const from = block.mutable_data_ptr<float>();
  for (int64_t i = 0, n = block.numel(); i < n; ++i) {
    to[i] += from[i];
    from[i] = 0;
  }
}

void ProductSum::add(const at::Tensor& rows) {
  const int64_t n = rows.size(0), size = rows.size(1), height = panel_of(size);
  if (panels_.empty()) {
    size_ = size;
    for (int64_t first = 0; first < size; first += height)
      panels_.emplace_back(at::zeros({std::min(height, size - first), size - first}, rows.options()));
  }
  for (int64_t done = 0; done < n;) {
    const int64_t more = std::min(kBlock - n_rows_, n - done);
    const at::Tensor part = rows.narrow(0, done, more);
    for (size_t k = 0; k < panels_.size(); ++k) {
      const int64_t first = int64_t(k) * height, width = panels_[k].block.size(0);
      panels_[k].block.addmm_(part.narrow(1, first, width).t(), part.narrow(1, first, size - first));
    }
    done += more;
    n_rows_ = (n_rows_ + more) % kBlock;
    if (n_rows_ == 0)
      for (auto& panel : panels_) panel.carry();
  }
}

at::Tensor ProductSum::total() const {
  if (panels_.empty()) return {};
  const at::Tensor made = at::empty({size_, size_}, panels_[0].block.options().dtype(at::kDouble));
  int64_t first = 0;
  for (const auto& panel : panels_) {
    const at::Tensor rows = panel.total();
    const int64_t height = rows.size(0);
    const at::Tensor square = rows.narrow(1, 0, height).triu();
    rows.narrow(1, 0, height).copy_(square.add(square.triu(1).t()));
    made.narrow(0, first, height).narrow(1, first, size_ - first).copy_(rows);
    made.narrow(0, first, size_ - first).narrow(1, first, height).copy_(rows.t());
    first += height;
  }
  return made;
}

void SquareSum::add(const at::Tensor& outputs, const at::Tensor& inputs) {
  const int64_t n = outputs.size(0), n_outputs = outputs.size(2), n_inputs = inputs.size(2);
  if (!sum_) sum_.emplace(at::zeros({n_outputs, n_inputs}, outputs.options()));
  if (outputs.is_cpu()) {
    const int64_t height = std::clamp<int64_t>(kTile / n_inputs, 1, n_outputs);
    const at::Tensor room = at::empty({height, n_inputs}, outputs.options());
    for (int64_t first = 0; first < n_outputs; first += height) {
      const int64_t rows = std::min(height, n_outputs - first);
      at::Tensor tile = room.narrow(0, 0, rows), into = sum_->block.narrow(0, first, rows);
      for (int64_t b = 0; b < n; ++b) {
        at::mm_out(tile, outputs.select(0, b).narrow(1, first, rows).t(), inputs.select(0, b));
        into.addcmul_(tile, tile);
      }
    }
  } else {
    const int64_t together = std::clamp<int64_t>(kAtOnce / (n_outputs * n_inputs), 1, std::max<int64_t>(n, 1));
    for (int64_t first = 0; first < n; first += together) {
      const int64_t more = std::min(together, n - first);
      const at::Tensor made = at::bmm(outputs.narrow(0, first, more).transpose(1, 2), inputs.narrow(0, first, more));
      sum_->block.add_(made.square_().sum(0));
    }
  }
  n_rows_ += n;
  if (n_rows_ >= kBlock) {
    sum_->carry();
    n_rows_ = 0;
  }
}

FactorSums::FactorSums(const std::string& kind) : squares_(kind == "squares") {
  TORCH_CHECK_VALUE(squares_ || kind == "products", broken_rule("capture", "kind", "be one of products, squares",
                                                                "'" + kind + "'", "Check the spelling."));
}

at::Tensor FactorSums::add(const at::Tensor& outputs, const at::Tensor& inputs, bool one,
                           const std::optional<at::Tensor>& left_out, double scale) {
  const at::Tensor real = left_out ? left_out->logical_not().expand({outputs.size(0), outputs.size(1), 1})
                                   : at::ones({outputs.size(0), outputs.size(1), 1}, outputs.options());
  const at::Tensor a = one ? at::cat({inputs, real.to(inputs.scalar_type())}, 2) : inputs;
  const at::Tensor g = scale == 1 ? outputs : outputs.mul(scale);
  const std::lock_guard<std::mutex> lock(mutex_);
  if (squares_) {
    const auto dtype = at::promoteTypes(g.scalar_type(), a.scalar_type());
    square_.add(g.to(dtype), a.to(dtype));
  } else {
    inputs_.add(a.flatten(0, 1));
    outputs_.add(g.flatten(0, 1));
  }
  return real.to(at::kFloat).sum(at::IntArrayRef{1, 2});
}

std::vector<at::Tensor> FactorSums::totals() const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (squares_) return square_.total().defined() ? std::vector{square_.total()} : std::vector<at::Tensor>();
  return inputs_.total().defined() ? std::vector{inputs_.total(), outputs_.total()} : std::vector<at::Tensor>();
}

}  // namespace tlfast
