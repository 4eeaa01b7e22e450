// Launches of the CUDA kernels in the order of the law: guard, current stream, zero-size return, launch, check.
#include "device.h"

#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "errors.h"

namespace tlfast {

#if TLFAST_CUDA
namespace {

// TLFAST_SIMT: a build for tests, whose kernels run on the CPU, on its tensors.
#if TLFAST_SIMT
constexpr at::DeviceType kGpu = at::kCPU;
#else
constexpr at::DeviceType kGpu = at::kCUDA;
#endif

void check(const std::string& who, int error) {
  TORCH_CHECK(error == 0,
              broken_rule(who, "a CUDA launch", "succeed", c10::str(tlfast_cuda_error(error), " (", error, ")"),
                          "An earlier kernel may have failed: run again with CUDA_LAUNCH_BLOCKING=1."));
}

}  // namespace

bool on_gpu(const at::Tensor& tensor) { return tensor.device().type() == kGpu; }

void* current_stream(const at::Device& device) {
#if TLFAST_SIMT
  return (void)device, nullptr;
#else
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
#endif
}

Done done_by_now(const at::Device& device) {
#if TLFAST_SIMT
  return (void)device, nullptr;
#else
  const auto done = std::make_shared<c10::Event>(device.type());
  done->record(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
  return done;
#endif
}

void wait_for(const Done& done, const at::Device& device) {
  if (done) done->block(c10::impl::VirtualGuardImpl(device.type()).getStream(device));
}

void read_here(const at::Tensor& tensor) {
#if TLFAST_SIMT
  (void)tensor;
#else
  if (on_gpu(tensor)) tensor.record_stream(c10::impl::VirtualGuardImpl(kGpu).getStream(tensor.device()));
#endif
}

void launch_capture(const std::string& who, const at::Device& device, void* stream, const CudaCapture& call) {
  const c10::OptionalDeviceGuard guard(device);
  check(who, tlfast_cuda_capture(&call, stream));
}

void launch_set_cursor(const at::Tensor& cursor, int64_t row) {
  const c10::OptionalDeviceGuard guard(cursor.device());
  check("capture", tlfast_cuda_set_cursor(cursor.mutable_data_ptr<int64_t>(), row, current_stream(cursor.device())));
}

void launch_advance(const at::Tensor& cursor, int64_t n_rows) {
  const c10::OptionalDeviceGuard guard(cursor.device());
  check("capture", tlfast_cuda_advance(cursor.mutable_data_ptr<int64_t>(), n_rows, current_stream(cursor.device())));
}

at::Tensor scratch_for(const CudaCapture& call, const at::Tensor& like) {
  const int64_t n_bytes = tlfast_cuda_scratch_bytes(&call);
  return n_bytes ? at::empty({n_bytes}, like.options().dtype(at::kByte)) : at::Tensor();
}

#else  // built without the CUDA kernels: nothing is on a GPU of ours, so nothing else is ever called

bool on_gpu(const at::Tensor&) { return false; }
void* current_stream(const at::Device&) { return nullptr; }
Done done_by_now(const at::Device&) { return nullptr; }
void wait_for(const Done&, const at::Device&) {}
void read_here(const at::Tensor&) {}
void launch_capture(const std::string&, const at::Device&, void*, const CudaCapture&) {}
void launch_set_cursor(const at::Tensor&, int64_t) {}
void launch_advance(const at::Tensor&, int64_t) {}
at::Tensor scratch_for(const CudaCapture&, const at::Tensor&) { return {}; }

#endif

}  // namespace tlfast
