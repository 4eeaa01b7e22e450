// The CUDA kernels to be called by ctypes: makes the view as capture.cpp does, and the scratch as large as it is told.
#include "capture_cuda.cu"

// The geometry of a call as torch has it: sizes and strides of the gradient, in elements; of `out` and of the mask only
// where they have the dimension.
struct FlatCall {
  int32_t n_dims, reduction, grad_dtype, out_dtype, ref_dtype;
  const int64_t *sizes, *grad_strides, *out_strides, *mask_strides, *ref_strides;
  const uint8_t* reduced;
  double scale;
  const void* grad;
  const void* ref;  // or null
  void* out;
  const uint8_t* mask;
  const int64_t* cursor;
  int64_t row_elements;
  int64_t* counters;
  int64_t scratch_bytes;  // what the call took; told back
};

#define API extern "C" __attribute__((visibility("default")))

API int simt_capture(FlatCall* flat) {
  tlfast::ViewBuilder builder;
  int out_dim = 0;
  for (int d = 0; d < flat->n_dims; ++d) {
    const int64_t of_mask = flat->mask ? flat->mask_strides[d] : 0, of_ref = flat->ref ? flat->ref_strides[d] : 0;
    if (flat->reduced[d])
      builder.reduce({flat->sizes[d], flat->grad_strides[d], 0, of_mask, of_ref});
    else
      builder.keep({flat->sizes[d], flat->grad_strides[d], flat->out_strides[out_dim++], of_mask, of_ref});
  }
  const auto reduction = tlfast::Reduction(flat->reduction);
  tlfast::CudaCapture call{.view = builder.build(reduction == tlfast::Reduction::last),
                           .reduction = reduction,
                           .grad_dtype = tlfast::Dtype(flat->grad_dtype),
                           .out_dtype = tlfast::Dtype(flat->out_dtype),
                           .ref_dtype = tlfast::Dtype(flat->ref_dtype),
                           .scale = flat->scale,
                           .grad = flat->grad,
                           .ref = flat->ref,
                           .out = flat->out,
                           .mask = flat->mask,
                           .cursor = flat->cursor,
                           .row_elements = flat->row_elements,
                           .counters = flat->counters,
                           .scratch = nullptr,
                           .gather = {}};
  const int64_t n_bytes = flat->scratch_bytes = tlfast_cuda_scratch_bytes(&call);
  constexpr int64_t kZone = 64;  // watched bytes behind the scratch; under AddressSanitizer it does that
  const std::unique_ptr<unsigned char[]> scratch(n_bytes ? new unsigned char[n_bytes + kZone] : nullptr);
  if (n_bytes) std::memset(scratch.get(), 0xff, n_bytes + kZone);
  call.scratch = scratch.get();
  const int error = tlfast_cuda_capture(&call, nullptr);
  const auto whole = [](unsigned char byte) { return byte == 0xff; };
  if (n_bytes && !std::all_of(scratch.get() + n_bytes, scratch.get() + n_bytes + kZone, whole)) return -1;
  return error;
}

API int simt_set_cursor(int64_t* cursor, int64_t row) { return tlfast_cuda_set_cursor(cursor, row, nullptr); }
API int simt_advance(int64_t* cursor, int64_t n_rows) { return tlfast_cuda_advance(cursor, n_rows, nullptr); }
API const void* simt_last_kernel() { return simt::last_kernel; }
API const char* simt_error(int error) { return tlfast_cuda_error(error); }
API void simt_status(int* out) {
  const tlfast::CudaStatus status = tlfast_cuda_status();
  out[0] = status.error, out[1] = status.n_devices, out[2] = status.driver, out[3] = status.runtime;
  tlfast_cuda_capability(0, &out[4], &out[5]);
}
