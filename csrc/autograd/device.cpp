// Launches of the CUDA kernels in the order of the law: guard, current stream, zero-size return, launch, check.
#include "device.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include "kernel/errors.h"

namespace tlfast {
namespace {

void check(const std::string& who, int error) {
  TORCH_CHECK(error == 0,
              broken_rule(who, "a CUDA launch", "succeed", c10::str(tlfast_cuda_error(error), " (", error, ")"),
                          "An earlier kernel may have failed: run again with CUDA_LAUNCH_BLOCKING=1."));
}

}  // namespace

void launch_capture(const std::string& who, const c10::Stream& stream, const CudaCapture& call) {
  const c10::OptionalDeviceGuard guard(stream.device());
  check(who, tlfast_cuda_capture(&call, native(stream)));
}

void launch_set_cursor(const at::Tensor& cursor, int64_t row) {
  const c10::OptionalDeviceGuard guard(cursor.device());
  void* const stream = native(current_stream(cursor.device()));
  check("capture", tlfast_cuda_set_cursor(cursor.mutable_data_ptr<int64_t>(), row, stream));
}

void launch_advance(const at::Tensor& cursor, int64_t n_rows) {
  const c10::OptionalDeviceGuard guard(cursor.device());
  void* const stream = native(current_stream(cursor.device()));
  check("capture", tlfast_cuda_advance(cursor.mutable_data_ptr<int64_t>(), n_rows, stream));
}

at::Tensor scratch_for(const CudaCapture& call, const at::Tensor& like) {
  const int64_t n_bytes = tlfast_cuda_scratch_bytes(&call);
  return n_bytes ? at::empty({n_bytes}, like.options().dtype(at::kByte)) : at::Tensor();
}

}  // namespace tlfast
