// The CUDA kernels behind a C interface: what a call is made of, and the functions that launch it; knows no torch.
#pragma once

#include "view.h"

namespace tlfast {

// What the kernels of one column keep on the device, in this order; `kCounters` int64 in all.
enum Counter : int { kNonfinite, kSaturated, kWrites, kCounters };

// One write: passed to the kernels by value, so it holds no pointer into host memory.
struct CudaCapture {
  View view;
  Reduction reduction;
  Dtype grad_dtype, out_dtype, ref_dtype;
  double scale;
  const void* grad;
  const void* ref;  // or null; else the gradient is multiplied with it
  void* out;
  const uint8_t* mask;    // or null
  const int64_t* cursor;  // or null; else the rows begin at out + cursor[0] * row_elements: read on the device
  int64_t row_elements;   // elements of `out` from one row to the next
  int64_t* counters;      // or null; kCounters numbers that are added to
  void* scratch;          // tlfast_cuda_scratch_bytes of memory, or null where that is 0
  Gather gather;
};

// What is there; `error` is the answer to the question for devices.
struct CudaStatus {
  bool built;                             // whether there are kernels at all: no_cuda.cpp stands in for them
  int error, n_devices, driver, runtime;  // versions as CUDA writes them: 13000 is 13.0
};

}  // namespace tlfast

// Each launches on `stream` (a cudaStream_t) of the current device and returns a cudaError_t: 0, or what went wrong.
// None of them waits, allocates, or looks at another stream.
extern "C" {
int64_t tlfast_cuda_scratch_bytes(const tlfast::CudaCapture* call);
int tlfast_cuda_capture(const tlfast::CudaCapture* call, void* stream);
int tlfast_cuda_set_cursor(int64_t* cursor, int64_t row, void* stream);  // cursor[0] = row
int tlfast_cuda_advance(int64_t* cursor, int64_t n_rows, void* stream);  // cursor[0] += n_rows
const char* tlfast_cuda_error(int error);
tlfast::CudaStatus tlfast_cuda_status();
int tlfast_cuda_capability(int device, int* major, int* minor);
}
