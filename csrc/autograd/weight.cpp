// Weight gradients: products of what was kept and what came back. The products are ATen's.
#include "weight.h"

#include <ATen/ops/bmm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/native_layer_norm.h>
#include <ATen/ops/pad.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <utility>

#include "bare.h"
#include "capture.h"
#include "kernel/errors.h"
#include "plain.h"

namespace tlfast {
namespace {

at::Tensor wide(const at::Tensor& tensor) { return tensor.to(accumulator(tensor.scalar_type())); }
at::TensorOptions wide_there(const at::Tensor& tensor) {
  return tensor.options().dtype(accumulator(tensor.scalar_type()));
}

// x [..., I] times a matrix [I, p] in the dtype of sums. What has 16 bits is made wide in parts: these stay in a cache,
// and elsewhere the memory isn't held of all of it.
at::Tensor product(const at::Tensor& x, const at::Tensor& matrix) {
  if (x.scalar_type() == matrix.scalar_type()) return at::matmul(x, matrix);
  const int64_t elements = int64_t(1) << (x.is_cpu() ? 18 : 25);
  const at::Tensor rows = x.reshape({-1, x.size(-1)});
  const int64_t n = rows.size(0), step = std::max<int64_t>(elements / std::max<int64_t>(x.size(-1), 1), 64);
  if (n <= step) return at::matmul(wide(x), matrix);
  const at::Tensor out = at::empty({n, matrix.size(1)}, matrix.options());
  const at::Tensor room = at::empty({step, x.size(-1)}, matrix.options());
  for (int64_t start = 0; start < n; start += step) {
    const int64_t some = std::min(step, n - start);
    const at::Tensor part = room.narrow(0, 0, some).copy_(rows.narrow(0, start, some));
    at::Tensor made = out.narrow(0, start, some);
    at::mm_out(made, part, matrix);
  }
  auto shape = x.sizes().vec();
  shape.back() = matrix.size(1);
  return out.view(shape);
}

// Positions [B, T, 1] that count for nothing, whatever lies there.
using Left = std::optional<at::Tensor>;
at::Tensor without(const at::Tensor& tensor, const Left& left_out) {
  return left_out ? tensor.masked_fill(*left_out, 0) : tensor;
}

// Those that the mask of a gradient [B, ..., D] leaves out.
Left left_out_by(const std::string& who, const std::optional<at::Tensor>& mask, const at::Tensor& grad) {
  if (!mask) return {};
  // A mask of positions that a gradient hasn't may have the size of its last dimension.
  TORCH_CHECK_VALUE(mask->dim() < std::max<int64_t>(grad.dim(), 2),
                    broken_rule(who, "mask", "have fewer dimensions than a gradient of shape " + list_of(grad.sizes()),
                                list_of(mask->sizes()), "This point has no positions: capture it on its own."));
  check_mask(who, *mask, grad);
  at::Tensor real = *mask;
  while (real.dim() < std::max<int64_t>(grad.dim() - 1, 2)) real = real.unsqueeze(-1);
  if (grad.dim() > 2) real = real.expand(grad.sizes().slice(0, grad.dim() - 1)).flatten(1);
  return real.logical_not().unsqueeze(2);
}

// [B, ..., D] as [B, T, D], where [B, D] has one position.
at::Tensor in_positions(const at::Tensor& tensor) {
  return tensor.dim() == 2 ? tensor.unsqueeze(1) : tensor.flatten(1, -2);
}

}  // namespace

Layer parse_layer(const std::string& name) {
  static constexpr std::array kNames{"linear", "conv", "embedding", "layer_norm", "rms_norm"};  // in the order of Layer
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return Layer(i);
  const std::string rule = c10::str("be one of ", c10::Join(", ", kNames));
  TORCH_CHECK_VALUE(false, broken_rule("capture", "layer", rule, "'" + name + "'", "Check the spelling."));
}

WeightRow parse_weight_row(const std::string& name) {
  // In the order of WeightRow.
  static constexpr std::array kNames{"gradient", "norm", "scores", "factors", "token norms", "token scores"};
  for (size_t i = 0; i < kNames.size(); ++i)
    if (name == kNames[i]) return WeightRow(i);
  const std::string rule = c10::str("be one of ", c10::Join(", ", kNames));
  TORCH_CHECK_VALUE(false, broken_rule("capture", "row", rule, "'" + name + "'", "Check the spelling."));
}

Weight::Weight(Form form)
    : form_(std::move(form)),
      early_(form_.right && form_.right->dim() == 2 && form_.layer != Layer::layer_norm &&
             form_.layer != Layer::rms_norm && form_.right->size(0) < form_.right->size(1) && !form_.whole) {
  const auto require = [](bool holds, const char* argument, const std::string& rule, const auto& got) {
    TORCH_CHECK_VALUE(holds, broken_rule("capture", argument, rule, c10::str(got), "Make it by Spec(of=\"weight\")."));
  };
  const Window& window = form_.window;
  const size_t n = window.kernel.size();
  const bool conv = form_.layer == Layer::conv;
  const auto positive = [](const std::vector<int64_t>& sizes) {
    return std::all_of(sizes.begin(), sizes.end(), [](int64_t size) { return size > 0; });
  };
  require(conv == (n > 0), "window", "be that of a convolution", n);
  require(window.stride.size() == n && window.dilation.size() == n && window.padding.size() == 2 * n &&
              window.groups > 0 && positive(window.kernel) && positive(window.stride) && positive(window.dilation),
          "window", "have sizes for each of its dimensions", n);
  const auto is_matrix = [](const std::optional<at::Tensor>& matrix, int64_t most) {
    return !matrix || (at::isFloatingType(matrix->scalar_type()) && is_plain(*matrix) && matrix->dim() >= 2 &&
                       matrix->dim() <= most && matrix->numel() > 0);
  };
  const auto sizes = [](const std::optional<at::Tensor>& matrix) { return matrix ? list_of(matrix->sizes()) : "none"; };
  require(is_matrix(form_.left, 3), "left", "be a matrix, or one of each head", sizes(form_.left));
  require(is_matrix(form_.right, 2), "right", "be a matrix", sizes(form_.right));
  const bool is_matrix_row = form_.row == WeightRow::gradient || form_.row == WeightRow::factors;
  require(form_.right || form_.layer != Layer::embedding || !is_matrix_row, "right", "be there for an embedding",
          "none");
  require(form_.heads >= 0, "heads", "be a number, 0 for none", form_.heads);
  require(form_.padding_idx >= -1, "padding_idx", "be a token, or -1", form_.padding_idx);
  require(form_.normalized >= 1, "normalized", "be a positive number", form_.normalized);
  require(form_.eps >= 0, "eps", "not be negative", form_.eps);
  require(std::isfinite(form_.scale), "scale", "be finite", form_.scale);
  require(scores() == bool(form_.queries), "queries", "be there for scores, and for these alone", scores());
  require(!form_.whole || ((form_.layer == Layer::linear || conv) && !per_token() && !form_.sums), "whole",
          "be of rows of linear layers and convolutions, for each example", "another");
  require(!form_.whole || !form_.whole->projects() || (!form_.left && !form_.right && !form_.heads), "whole",
          "project alone", "with others");
  const bool has_factors = form_.layer == Layer::linear || (conv && window.groups == 1);
  const bool fits = has_factors && !form_.heads && (!form_.left || form_.left->dim() == 2);
  require(form_.sums ? fits : form_.row != WeightRow::sums, "sums",
          "be there, of a linear layer without heads or a convolution without groups", form_.sums ? "another" : "none");
}

at::Tensor Weight::keep(const std::string& who, const at::Tensor& input) const {
  const Bare bare;
  const at::Tensor given = input.detach();
  switch (form_.layer) {
    case Layer::linear:
      TORCH_CHECK_VALUE(given.dim() >= 2, broken_rule(who, "the input", "have the batch before its last dimension",
                                                      list_of(given.sizes()), "Give the model a batch."));
      return early_ ? project_input(in_positions(given)) : given;
    case Layer::conv:
      TORCH_CHECK_VALUE(given.dim() == int64_t(form_.window.kernel.size()) + 2,
                        broken_rule(who, "the input", "have the batch as its first dimension", list_of(given.sizes()),
                                    "Give the model a batch."));
      return early_ ? convolved(given) : given;
    case Layer::embedding:
      TORCH_CHECK_VALUE(given.dim() >= 2, broken_rule(who, "the input", "be tokens of a batch, [B, P]",
                                                      list_of(given.sizes()), "Give the model a batch."));
      return given;
    case Layer::layer_norm:
    case Layer::rms_norm:
      return normal(given);
  }
  TORCH_INTERNAL_ASSERT(false);
}

// [B, T, I] to R a, [B, T, p].
at::Tensor Weight::project_input(const at::Tensor& input) const {
  const at::Tensor right = moved_.turned(*form_.right, wide_there(input));
  if (!form_.bias) return applied(right, form_.right_sketch, input);
  const int64_t n = right.size(0) - 1;
  return applied(right.narrow(0, 0, n), form_.right_sketch, input).add_(right.select(0, n));
}

bool Weight::shares(const at::Tensor& input) const {
  return form_.layer == Layer::linear && early_ && !form_.right_sketch && input.dim() >= 2 &&
         at::isFloatingType(input.scalar_type()) && input.size(-1) == form_.right->size(1) - int64_t(form_.bias);
}

at::Tensor Weight::right_for(const at::TensorOptions& there) const {
  const Bare bare;
  return moved_.turned(*form_.right, there).narrow(0, 0, form_.right->size(1) - int64_t(form_.bias));
}

std::vector<at::Tensor> Weight::keep_for(const std::vector<std::shared_ptr<const Weight>>& weights,
                                         const at::Tensor& input, const at::Tensor& matrix) {
  const Bare bare;
  const at::Tensor all = product(in_positions(input.detach()), matrix);
  std::vector<at::Tensor> parts;
  int64_t first = 0;
  for (const auto& weight : weights) {
    const at::Tensor& right = *weight->form_.right;
    parts.push_back(all.narrow(2, first, right.size(0)));
    if (weight->form_.bias)
      parts.back().add_(weight->moved_.turned(right, matrix.options()).select(0, right.size(1) - 1));
    first += right.size(0);
  }
  return parts;
}

// [..., I] times a turned matrix [I, p], or what does the same; in the dtype of sums.
at::Tensor Weight::applied(const at::Tensor& turned, const std::shared_ptr<const Sketcher>& sketch,
                           const at::Tensor& x) const {
  if (!sketch || !x.is_cpu() || turned.scalar_type() != at::kFloat) return product(x, turned);
  auto shape = x.sizes().vec();
  const at::Tensor rows = wide(x).reshape({-1, shape.back()}).contiguous();
  shape.back() = turned.size(1);
  return sketch->rows(rows)->view(shape);
}

// The same of a convolution's windows: one more convolution, whose weights are the matrix.
at::Tensor Weight::convolved(const at::Tensor& input) const {
  const Window& window = form_.window;
  const at::Tensor a = wide(input), right = moved_.turned(*form_.right, a.options()).t();
  const int64_t p = right.size(0), n = right.size(1) - form_.bias, groups = window.groups;
  std::vector<int64_t> shape{groups * p, a.size(1) / groups};
  shape.insert(shape.end(), window.kernel.begin(), window.kernel.end());
  const at::Tensor weights = right.narrow(1, 0, n).unsqueeze(0).expand({groups, p, n}).reshape(shape);
  const auto bias = form_.bias ? std::optional(right.select(1, n).repeat({groups})) : std::nullopt;
  const std::vector<int64_t> none(window.kernel.size(), 0);
  const at::Tensor padded = at::pad(a, window.padding, window.padding_mode);
  return at::convolution(padded, weights, bias, window.stride, none, window.dilation, false, none, groups);
}

// The windows of a padded input [B, C, ...] as [B, groups, T, C / groups * kernel].
at::Tensor Weight::windows(const at::Tensor& padded) const {
  const Window& window = form_.window;
  const int64_t n = int64_t(window.kernel.size());
  at::Tensor seen = padded;
  for (int64_t d = 0; d < n; ++d) {
    const int64_t dilation = window.dilation[d], reach = dilation * (window.kernel[d] - 1) + 1;
    seen = seen.unfold(2 + d, reach, window.stride[d]);
    if (dilation > 1) seen = seen.slice(-1, 0, reach, dilation);
  }
  seen = seen.flatten(2 + n, -1).flatten(2, 1 + n).unflatten(1, {window.groups, -1});  // [B, groups, C', T, kernel]
  return seen.transpose(2, 3).flatten(3, 4);
}

at::Tensor Weight::normal(const at::Tensor& input) const {
  const at::Tensor a = wide(input);
  if (form_.layer == Layer::layer_norm)
    return std::get<0>(at::native_layer_norm(a, a.sizes().slice(a.dim() - form_.normalized), {}, {}, form_.eps));
  std::vector<int64_t> dims;
  for (int64_t d = a.dim() - form_.normalized; d < a.dim(); ++d) dims.push_back(d);
  return a.mul(a.square().mean(dims, /*keepdim=*/true).add(form_.eps).rsqrt());
}

// The gradient as [B, T, O]; of a convolution as [B * groups, T, O / groups], beside the windows of each group, and
// wide.
at::Tensor Weight::outputs_of(const std::string& who, const at::Tensor& grad) const {
  TORCH_CHECK_VALUE(grad.dim() >= 2, broken_rule(who, "a gradient", "have the batch before its last dimension",
                                                 list_of(grad.sizes()), "Give the model a batch."));
  if (form_.layer != Layer::conv) return in_positions(grad);
  return wide(grad).flatten(2).unflatten(1, {groups(), -1}).flatten(0, 1).transpose(1, 2);
}

// [B, T, O] to L g, [B, T, p], or of n heads [B, T, n * p], wide. The groups of a convolution have other columns of L.
at::Tensor Weight::project_outputs(const at::Tensor& given) const {
  if (!form_.left || form_.whole) return wide(given);
  const at::Tensor left = moved_.turned(*form_.left, wide_there(given));
  if (groups() == 1 && left.dim() == 2) return applied(left, form_.left_sketch, given);
  const at::Tensor g = wide(given);
  if (groups() > 1) {
    const at::Tensor each = left.unflatten(0, {groups(), -1});  // [groups, O / groups, p]
    const at::Tensor by_group = g.unflatten(0, {-1, groups()}).transpose(0, 1).flatten(1, 2);    // [groups, B * T, O']
    return at::bmm(by_group, each).unflatten(1, {-1, g.size(1)}).transpose(0, 1).flatten(0, 1);  // [B * groups, T, p]
  }
  const int64_t n = left.size(0);
  const at::Tensor by_head = g.unflatten(2, {n, -1}).flatten(0, 1).transpose(0, 1);  // [n, B * T, O / n]
  return at::bmm(by_head, left).transpose(0, 1).reshape({g.size(0), g.size(1), -1});
}

// The norms of G of examples whose G is larger than what holds the products of each two positions; in parts, so that
// no more of these are there than of G. `same`: the tokens of one-hot inputs, which have a product where they are
// equal.
at::Tensor Weight::norms_by_products(const at::Tensor& outputs, const at::Tensor& inputs, bool one, bool same) const {
  static constexpr int64_t kPositions = 256;
  at::Tensor total = outputs.new_zeros({outputs.size(0)});
  for (int64_t start = 0; start < outputs.size(1); start += kPositions) {
    const int64_t n = std::min(kPositions, outputs.size(1) - start);
    at::Tensor products = at::bmm(outputs.narrow(1, start, n), outputs.transpose(1, 2));
    if (same) {
      products = products.mul_(inputs.narrow(1, start, n).unsqueeze(2).eq(inputs.unsqueeze(1)));
    } else {
      const at::Tensor of_inputs = at::bmm(inputs.narrow(1, start, n), inputs.transpose(1, 2));
      products = products.mul_(one ? of_inputs.add(1) : of_inputs);
    }
    total.add_(products.sum({1, 2}));
  }
  return total.clamp_min_(0).sqrt_();
}

at::Tensor Weight::of_norm(const std::string& who, const at::Tensor& kept, const at::Tensor& grad,
                           const std::optional<at::Tensor>& mask) const {
  TORCH_CHECK_VALUE(kept.sizes() == grad.sizes(),
                    broken_rule(who, "the gradient of a norm", "have its input's shape " + list_of(kept.sizes()),
                                list_of(grad.sizes()), "Leave this point out."));
  const int64_t n = form_.normalized;
  const auto flat = [&](const at::Tensor& tensor) { return in_positions(n > 1 ? tensor.flatten(-n, -1) : tensor); };
  const Left left_out = left_out_by(who, mask, n > 1 ? grad.flatten(-n, -1) : grad);
  const at::Tensor g = without(flat(wide(grad)), left_out);
  at::Tensor each = g.mul(without(flat(kept), left_out));
  if (form_.bias) each = at::cat({each, g}, -1);
  if (!per_token()) each = each.sum(1);
  if (form_.right) each = at::matmul(each, moved_.turned(*form_.right, each.options()));
  if (scores())
    return form_.queries->of_gradients(each.flatten(0, -2)).unflatten(0, each.sizes().slice(0, each.dim() - 1));
  if (form_.row == WeightRow::gradient || form_.row == WeightRow::factors) return each;
  return at::linalg_vector_norm(each, 2, at::IntArrayRef{-1});
}

// The input as it was kept, [B, T, Q], or of a convolution [B * groups, T, Q].
at::Tensor Weight::inputs_of(const at::Tensor& kept, const at::Tensor& given) const {
  const Window& window = form_.window;
  switch (form_.layer) {
    case Layer::linear: {
      if (early_) return kept;
      const at::Tensor a = wide(in_positions(kept));
      return form_.right && !form_.whole ? project_input(a) : a;
    }
    case Layer::conv: {
      if (early_) return kept.flatten(2).unflatten(1, {window.groups, -1}).flatten(0, 1).transpose(1, 2);
      const at::Tensor a = windows(at::pad(wide(kept), window.padding, window.padding_mode)).flatten(0, 1);
      return form_.right && !form_.whole ? project_input(a) : a;
    }
    case Layer::embedding: {
      const at::Tensor tokens = kept.flatten(1);
      if (!form_.right) return tokens;
      return moved_.turned(*form_.right, wide_there(given))
          .index_select(0, tokens.flatten())
          .unflatten(0, tokens.sizes());
    }
    case Layer::layer_norm:
    case Layer::rms_norm:
      break;
  }
  TORCH_INTERNAL_ASSERT(false);
}

at::Tensor Weight::rows(const std::string& who, const at::Tensor& kept, const at::Tensor& grad,
                        const std::optional<at::Tensor>& mask, double scale) const {
  const Bare bare;
  if (form_.layer == Layer::layer_norm || form_.layer == Layer::rms_norm) return of_norm(who, kept, grad, mask);
  const bool conv = form_.layer == Layer::conv;
  TORCH_CHECK_VALUE(!conv || !mask, broken_rule(who, "mask", "be left out at a convolution", "one",
                                                "Its windows are no tokens: capture it on its own."));
  const at::Tensor given = outputs_of(who, grad);
  at::Tensor inputs = inputs_of(kept, given);
  TORCH_CHECK_VALUE(inputs.size(0) == given.size(0) && inputs.size(1) == given.size(1),
                    broken_rule(who, "the input that was kept", "have the positions of the gradient",
                                list_of(inputs.sizes()), "Leave this point out."));
  Left left_out = left_out_by(who, mask, grad);
  if (form_.padding_idx >= 0) {  // torch gives this token no gradient
    const at::Tensor padding = kept.flatten(1).eq(form_.padding_idx).unsqueeze(2);
    left_out = left_out ? left_out->logical_or(padding) : padding;
  }
  const at::Tensor outputs = without(project_outputs(given), left_out);
  const bool one = form_.bias && (!form_.right || form_.whole), same = form_.layer == Layer::embedding && !form_.right;
  const int64_t n_positions = outputs.size(1), size = outputs.size(2) * (same ? n_positions : inputs.size(2));
  if (!same) inputs = without(inputs, left_out);
  if (form_.sums) return form_.sums->add(outputs, inputs, one, left_out, scale);
  if (form_.whole) return of_whole(outputs, inputs, one);
  if (form_.row == WeightRow::norm && groups() == 1 && (same || 2 * n_positions * n_positions < size))
    return norms_by_products(outputs, inputs, one, same);
  TORCH_CHECK_VALUE(!per_token() || grad.dim() > 2, broken_rule(who, "a gradient", "have positions as dimension 1",
                                                                list_of(grad.sizes()), "Use per=\"example\" there."));
  if (scores()) return scores_of(outputs, inputs, one, same);
  if (form_.row == WeightRow::token_norms) {
    const at::Tensor norms = at::linalg_vector_norm(outputs, 2, at::IntArrayRef{2});
    if (same) return norms;
    return norms.mul_(inputs.square().sum(2).add_(int64_t(one)).sqrt_());
  }
  const auto dtype = at::promoteTypes(outputs.scalar_type(), inputs.scalar_type());
  if (form_.row == WeightRow::factors) {
    std::vector<at::Tensor> pair{outputs.mul(scale).to(dtype), inputs.to(dtype)};
    if (one) pair.push_back(outputs.new_ones({outputs.size(0), n_positions, 1}).to(dtype));
    return at::cat(pair, -1);
  }
  const at::Tensor sums = sums_of(outputs, inputs, one);
  if (form_.row == WeightRow::norm) return at::linalg_vector_norm(sums, 2, at::IntArrayRef{1, 2});
  return form_.heads ? sums.unflatten(1, {form_.heads, -1}) : sums;
}

// G of [B * groups, T, O] and [B * groups, T, I].
at::Tensor Weight::sums_of(const at::Tensor& outputs, const at::Tensor& inputs, bool one) const {
  const auto dtype = at::promoteTypes(outputs.scalar_type(), inputs.scalar_type());
  at::Tensor sums = at::bmm(outputs.to(dtype).transpose(1, 2), inputs.to(dtype));
  if (one) sums = at::cat({sums, outputs.sum(1).to(dtype).unsqueeze(2)}, 2);
  if (groups() == 1) return sums;
  sums = sums.unflatten(0, {-1, groups()});
  return form_.left && !form_.whole ? sums.sum(1) : sums.flatten(1, 2);
}

// The rows of gradients [B * groups, T, O] and inputs [B * groups, T, I] whose G is made first; of some examples at a
// time.
at::Tensor Weight::of_whole(const at::Tensor& outputs, const at::Tensor& inputs, bool one) const {
  static constexpr int64_t kElements = int64_t(1) << 24;
  const int64_t n = outputs.size(0) / groups(), each = outputs.size(2) * groups() * (inputs.size(2) + int64_t(one));
  const int64_t step = std::clamp<int64_t>(kElements / std::max<int64_t>(each, 1), 1, std::max<int64_t>(n, 1));
  std::vector<at::Tensor> rows;
  for (int64_t start = 0; start == 0 || start < n; start += step) {
    const int64_t first = start * groups(), more = std::min(step, n - start) * groups();
    rows.push_back(row_of_whole(
        form_.whole->normalized(sums_of(outputs.narrow(0, first, more), inputs.narrow(0, first, more), one))));
  }
  return rows.size() == 1 ? rows[0] : at::cat(rows);
}

// [n, O, I], normalized, to what a row is.
at::Tensor Weight::row_of_whole(const at::Tensor& gradients) const {
  at::Tensor row = gradients;
  if (form_.whole->projects()) {
    row = form_.whole->projected(gradients.flatten(1));
  } else {
    if (form_.heads) row = row.unflatten(1, {form_.heads, -1});
    if (form_.left) row = at::matmul(moved_.like(*form_.left, row), row);
    if (form_.right) row = at::matmul(row, moved_.turned(*form_.right, row.options()));
  }
  if (scores()) return form_.queries->of_gradients(row);
  return form_.row == WeightRow::norm ? at::linalg_vector_norm(row.flatten(1), 2, at::IntArrayRef{1}) : row;
}

// The dot products of G, or of each position's, with the queries. Some rows of G are there at a time, of all examples:
// queries, which are large, are read once.
at::Tensor Weight::scores_of(const at::Tensor& outputs, at::Tensor inputs, bool one, bool tokens) const {
  static constexpr int64_t kElements = int64_t(1) << 20, kLeastRows = 64;
  const Queries& queries = *form_.queries;
  const int64_t n_positions = outputs.size(1);
  const bool whole = groups() > 1 || (!tokens && queries.want_gradients(n_positions));
  if (form_.row == WeightRow::token_scores || !whole) {
    if (one) inputs = at::cat({inputs, inputs.new_ones({inputs.size(0), n_positions, 1})}, -1);
    const auto dtype = at::promoteTypes(outputs.scalar_type(), tokens ? outputs.scalar_type() : inputs.scalar_type());
    const at::Tensor each = queries.of_positions(outputs.to(dtype), tokens ? inputs : inputs.to(dtype), tokens);
    return form_.row == WeightRow::token_scores ? each : each.sum(1);
  }
  if (groups() > 1) return queries.of_gradients(sums_of(outputs, inputs, one));
  const int64_t n = outputs.size(2), of_row = outputs.size(0) * (inputs.size(2) + int64_t(one));
  const int64_t step = std::max(kLeastRows, kElements / std::max<int64_t>(of_row, 1));
  at::Tensor total;
  for (int64_t start = 0; start < n; start += step) {
    const at::Tensor some = outputs.narrow(2, start, std::min(step, n - start));
    const at::Tensor part = queries.of_gradients(sums_of(some, inputs, one), start);
    total = total.defined() ? total.add_(part) : part;
  }
  return total;
}

}  // namespace tlfast
