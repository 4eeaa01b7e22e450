// A tensor that a step is given, on the stream that reads it.
#include "step_input.h"

#include <utility>

namespace tlfast {

StepInput::StepInput(at::Tensor given, bool recording) : tensor(std::move(given)), recorded(recording) {
  if (!on_gpu(tensor)) return;
  stream = current_stream(tensor.device());
  made = done_by_now(*stream);
}

const at::Tensor& StepInput::here(bool recording) const {
  if (!stream) return tensor;
  const c10::Stream current = current_stream(tensor.device());
  if (current == *stream) return tensor;
  if (recorded == recording) wait_for(made, current);  // else the device was idle between the two
  read_on(current, tensor);
  return tensor;
}

}  // namespace tlfast
