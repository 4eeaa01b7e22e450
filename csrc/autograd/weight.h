// The gradient of a module's weight, for each example: of what its forward keeps and its backward brings.
#pragma once

#include <ATen/core/Tensor.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "factor_sums.h"
#include "moved.h"
#include "queries.h"
#include "sketcher.h"
#include "whole.h"

namespace tlfast {

// What the module does with its weight.
enum class Layer { linear, conv, embedding, layer_norm, rms_norm };
Layer parse_layer(const std::string& name);

// What a row is: the gradient, its norm, or its dot products with queries; of each position the two factors, side by
// side, the norm, or these products; or the number of positions that were added to running sums.
enum class WeightRow { gradient, norm, scores, factors, token_norms, token_scores, sums };
WeightRow parse_weight_row(const std::string& name);

// The window that a convolution lays on its input.
struct Window {
  std::vector<int64_t> kernel, stride, dilation, padding;  // padding: as at::pad takes it, the last dimension first
  std::string padding_mode = "constant";
  int64_t groups = 1;
};

// Takes an input a [B, T, I] and a gradient g [B, T, O] to G = sum_t g a^T [B, O, I], or to L G R^T. With a bias, a has
// a last 1. A convolution has its windows in place of positions, an embedding one-hot inputs. The weight of a norm is a
// vector: G = sum_t g x, where x is the normalized input; it is projected by the right matrix alone.
class Weight {
 public:
  struct Form {
    Layer layer;
    WeightRow row;
    bool bias;
    std::optional<at::Tensor> left, right;  // L [p, O], or of each head [n, p, O / n], and R [p, I]; on the CPU
    double scale;                           // of the rows, beside that of the loss
    int64_t heads;                          // as which the outputs are taken; 0: as one
    Window window;
    int64_t padding_idx;  // of an embedding; -1: none
    int64_t normalized;   // how many dimensions a norm has
    double eps;
    std::shared_ptr<const Sketcher> left_sketch, right_sketch;  // do what L, and R without its bias, do on the CPU
    std::shared_ptr<const Queries> queries;                     // of scores
    std::shared_ptr<FactorSums> sums = nullptr;                 // of `WeightRow::sums`
    std::shared_ptr<const Whole> whole = nullptr;               // makes G first, and the row of that
  };
  explicit Weight(Form form);

  // What a forward keeps of its input: projected, where that is smaller.
  at::Tensor keep(const std::string& who, const at::Tensor& input) const;

  // Whether `keep` is a product with R of this input, which may be made for several weights at once; R without its bias
  // there, turned; and for each of these weights what it keeps, of a matrix that has theirs side by side.
  bool shares(const at::Tensor& input) const;
  at::Tensor right_for(const at::TensorOptions& there) const;
  static std::vector<at::Tensor> keep_for(const std::vector<std::shared_ptr<const Weight>>& weights,
                                          const at::Tensor& input, const at::Tensor& matrix);

  // The rows of one call [B, ...], float32 or float64. `scale`: the factor on the gradient, which is on the rows, too,
  // but where these are pairs of factors.
  at::Tensor rows(const std::string& who, const at::Tensor& kept, const at::Tensor& grad,
                  const std::optional<at::Tensor>& mask, double scale) const;
  double scale(double of_loss) const { return form_.sums ? 1 : pairs() ? form_.scale : form_.scale * of_loss; }

  bool adds_up() const { return form_.row != WeightRow::norm && form_.row != WeightRow::token_norms; }

 private:
  bool pairs() const {
    return form_.row == WeightRow::factors && form_.layer != Layer::layer_norm && form_.layer != Layer::rms_norm;
  }
  bool per_token() const { return form_.row >= WeightRow::factors; }
  bool scores() const { return form_.row == WeightRow::scores || form_.row == WeightRow::token_scores; }
  int64_t groups() const { return form_.layer == Layer::conv ? form_.window.groups : 1; }
  at::Tensor applied(const at::Tensor& turned, const std::shared_ptr<const Sketcher>& sketch,
                     const at::Tensor& x) const;
  at::Tensor project_input(const at::Tensor& input) const;
  at::Tensor convolved(const at::Tensor& input) const;
  at::Tensor windows(const at::Tensor& padded) const;
  at::Tensor normal(const at::Tensor& input) const;
  at::Tensor inputs_of(const at::Tensor& kept, const at::Tensor& given) const;
  at::Tensor outputs_of(const std::string& who, const at::Tensor& grad) const;
  at::Tensor project_outputs(const at::Tensor& given) const;
  at::Tensor sums_of(const at::Tensor& outputs, const at::Tensor& inputs, bool one) const;
  at::Tensor of_whole(const at::Tensor& outputs, const at::Tensor& inputs, bool one) const;
  at::Tensor row_of_whole(const at::Tensor& gradients) const;
  at::Tensor scores_of(const at::Tensor& outputs, at::Tensor inputs, bool one, bool tokens) const;
  at::Tensor norms_by_products(const at::Tensor& outputs, const at::Tensor& inputs, bool one, bool same) const;
  at::Tensor of_norm(const std::string& who, const at::Tensor& kept, const at::Tensor& grad,
                     const std::optional<at::Tensor>& mask) const;

  const Form form_;
  const bool early_;  // the input is projected in the forward
  const Moved moved_;
};

}  // namespace tlfast
