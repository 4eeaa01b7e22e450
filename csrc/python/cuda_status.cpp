// What CUDA finds on this machine. No context is made: only the driver is asked, and other threads may run meanwhile.
#include "cuda_status.h"

#include "autograd/streams.h"
#include "kernel/capture_cuda.h"
#include "kernel/errors.h"

namespace tlfast {

pybind11::dict cuda_status() {
  using pybind11::operator""_a;
  CudaStatus status;
  {
    pybind11::gil_scoped_release release;
    status = tlfast_cuda_status();
  }
  return pybind11::dict("built"_a = status.built, "simt"_a = cpu_plays_gpu, "error"_a = status.error,
                        "message"_a = status.error ? tlfast_cuda_error(status.error) : "",
                        "n_devices"_a = status.n_devices, "driver"_a = status.driver, "runtime"_a = status.runtime);
}

std::pair<int, int> cuda_capability(int device) {
  int major = 0, minor = 0;
  const int error = tlfast_cuda_capability(device, &major, &minor);
  TORCH_CHECK(error == 0,
              broken_rule("cuda_capability", "device", "be a visible GPU", device, tlfast_cuda_error(error)));
  return {major, minor};
}

}  // namespace tlfast
