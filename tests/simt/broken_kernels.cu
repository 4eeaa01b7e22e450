// Kernels with one mistake each, that the shim must catch; `reduce_block` has it or hasn't.

extern __shared__ __align__(16) unsigned char tlfast_shared[];

namespace {

// The sum of one number a thread, by halves; a power of two of threads.
__global__ void reduce_block(float* out, const float* in, bool barrier) {
  float* shared = reinterpret_cast<float*>(tlfast_shared);
  const unsigned t = threadIdx.x;
  shared[t] = in[t];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (barrier) __syncthreads();
    if (t < half) shared[t] += shared[t + half];
  }
  if (t == 0) *out = shared[0];
}

enum Mistake : int {
  barrier_in_branch,
  barrier_for_some,
  barrier_after_return,
  barrier_against_shuffle,
  lane_gone,
  lane_of_no_thread,
  lane_at_another_call,
  lane_with_another_mask,
  caller_not_in_mask,
  width_of_three,
  behind_shared,
  none
};

__global__ void mistaken(float* out, Mistake mistake) {
  const unsigned t = threadIdx.x;
  const unsigned all = 0xffffffffu;
  switch (mistake) {
    case barrier_in_branch:
      if (t < 40)
        __syncthreads();
      else
        __syncthreads();
      break;
    case barrier_for_some:
      if (t < 32) __syncthreads();
      break;
    case barrier_after_return:
      if (t == 33) return;
      __syncthreads();
      break;
    case barrier_against_shuffle:
      if (t == 3)
        __syncthreads();
      else
        out[t] = __shfl_down_sync(all, float(t), 1);
      break;
    case lane_gone:
      if (t % 32 == 7) return;
      out[t] = __shfl_down_sync(all, float(t), 1);
      break;
    case lane_of_no_thread:
      out[t] = __shfl_xor_sync(all, float(t), 1);
      break;
    case lane_at_another_call:
      if (t % 2)
        out[t] = __shfl_xor_sync(all, float(t), 2);
      else
        out[t] = float(__ballot_sync(all, 1));
      break;
    case lane_with_another_mask:
      out[t] = __shfl_sync(t % 32 < 16 ? 0xffffu : all, float(t), 0);
      break;
    case caller_not_in_mask:
      __syncwarp(0x7fffffffu);
      break;
    case width_of_three:
      out[t] = __shfl_down_sync(all, float(t), 1, 3);
      break;
    case behind_shared:
      reinterpret_cast<float*>(tlfast_shared)[t + 1] = float(t);
      break;
    case none:
      __syncthreads();
      out[t] = __shfl_down_sync(all, float(t), 1);
  }
}

// A tail that nobody has thought of.
__global__ void store_all(float* out, const float* in) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = in[i];
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int run_reduce(float* out, const float* in, unsigned n, int barrier) {
  simt::launch(reduce_block, 1, n, n * sizeof(float), nullptr, out, in, barrier != 0);
  return cudaGetLastError();
}
API int run_mistaken(float* out, unsigned n, int mistake) {
  simt::launch(mistaken, 1, n, n * sizeof(float), nullptr, out, Mistake(mistake));
  return cudaGetLastError();
}
API int run_store_all(unsigned n_out, unsigned n_threads) {
  const std::unique_ptr<float[]> out(new float[n_out]), in(new float[n_threads]());
  simt::launch(store_all, n_threads / 32, 32, 0, nullptr, out.get(), in.get());
  return cudaGetLastError();
}
