// What CUDA finds on this machine. No context is made: only the driver is asked, and other threads may run meanwhile.
#include "cuda_status.h"

#include "kernel/capture_cuda.h"
#include "kernel/errors.h"

namespace tlfast {

#if defined(TLFAST_SIMT)
constexpr bool kSimt = true;
#else
constexpr bool kSimt = false;
#endif

namespace {

pybind11::dict as_dict(bool built, const CudaStatus& status, const std::string& message) {
  using pybind11::operator""_a;
  return pybind11::dict("built"_a = built, "simt"_a = kSimt, "error"_a = status.error, "message"_a = message,
                        "n_devices"_a = status.n_devices, "driver"_a = status.driver, "runtime"_a = status.runtime);
}

}  // namespace

#if defined(TLFAST_CUDA)

pybind11::dict cuda_status() {
  CudaStatus status;
  {
    pybind11::gil_scoped_release release;
    status = tlfast_cuda_status();
  }
  return as_dict(true, status, status.error == 0 ? "" : tlfast_cuda_error(status.error));
}

std::pair<int, int> cuda_capability(int device) {
  int major = 0, minor = 0;
  const int error = tlfast_cuda_capability(device, &major, &minor);
  TORCH_CHECK(error == 0,
              broken_rule("cuda_capability", "device", "be a visible GPU", device, tlfast_cuda_error(error)));
  return {major, minor};
}

#else

pybind11::dict cuda_status() { return as_dict(false, CudaStatus{}, ""); }

std::pair<int, int> cuda_capability(int device) {
  TORCH_CHECK(false, broken_rule("cuda_capability", "device", "be a visible GPU", device, "Build with CUDA."));
}

#endif

}  // namespace tlfast
