// Stands in for the CUDA kernels where the build has none: nothing is launched, and there is no device.
#include "capture_cuda.h"

namespace {

constexpr int kNone = 1;  // any error but 0

}  // namespace

int64_t tlfast_cuda_scratch_bytes(const tlfast::CudaCapture*) { return 0; }
int tlfast_cuda_capture(const tlfast::CudaCapture*, void*) { return kNone; }
int tlfast_cuda_set_cursor(int64_t*, int64_t, void*) { return kNone; }
int tlfast_cuda_advance(int64_t*, int64_t, void*) { return kNone; }
const char* tlfast_cuda_error(int error) { return error ? "Build with CUDA." : "no error"; }
tlfast::CudaStatus tlfast_cuda_status() { return {}; }
int tlfast_cuda_capability(int, int*, int*) { return kNone; }
