// What is done with weight gradients that are formed for it: they are normalized at each place, and projected at once.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <memory>
#include <optional>

#include "moved.h"
#include "sketcher.h"

namespace tlfast {

// vec(D * G), where * is element by element, times R [p, O * I]: by the matrix itself, by a sketch on the CPU, or by
// what Python does.
class Whole {
 public:
  using Project = std::function<at::Tensor(const at::Tensor&)>;
  Whole(std::optional<at::Tensor> factor, std::optional<at::Tensor> matrix, std::shared_ptr<const Sketcher> sketch,
        Project project);

  bool projects() const { return matrix_ || sketch_ || project_; }

  // Gradients [n, O, I] times D [O, I], where they lie.
  at::Tensor normalized(at::Tensor gradients) const;

  // [n, O * I] to [n, p].
  at::Tensor projected(const at::Tensor& flat) const;

 private:
  const std::optional<at::Tensor> factor_, matrix_;
  const std::shared_ptr<const Sketcher> sketch_;
  const Project project_;
  const Moved moved_;
};

}  // namespace tlfast
