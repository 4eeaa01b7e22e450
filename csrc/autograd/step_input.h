// What a step is given beside its gradients, and where that was made.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "streams.h"

namespace tlfast {

// A tensor on one device: a mask, or what gradients are multiplied with.
struct StepInput {
  StepInput(at::Tensor tensor, bool recording);

  // The tensor for the current stream of its device: another one than that which made it comes after that.
  const at::Tensor& here(bool recording) const;

  at::Tensor tensor;
  bool recorded;                      // made while a step was recorded: only that recording can wait for it
  std::optional<c10::Stream> stream;  // of a GPU
  Done made;
};

// What a step gives one column for itself.
struct OwnInputs {
  std::optional<StepInput> mask;  // in place of the step's: a decoder has positions of its own
  std::optional<StepInput> ref;   // what the gradient is multiplied with
  std::optional<at::Tensor> at;   // positions of each example: see `Given`
};

}  // namespace tlfast
