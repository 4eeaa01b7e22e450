// Kernels that show what the shim does: indices, collectives, shared memory, the order of threads, limits, conversions.
#include "reduce.h"

extern __shared__ __align__(16) unsigned char tlfast_shared[];

namespace {

struct Everyone {
  int thread[3], block[3], block_size[3], grid_size[3];
};

__global__ void who_am_i(Everyone* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = {{int(threadIdx.x), int(threadIdx.y), int(threadIdx.z)},
                                                                {int(blockIdx.x), int(blockIdx.y), int(blockIdx.z)},
                                                                {int(blockDim.x), int(blockDim.y), int(blockDim.z)},
                                                                {int(gridDim.x), int(gridDim.y), int(gridDim.z)}};
}

// Each lane in the mask shuffles its own number; 0 shuffle, 1 up, 2 down, 3 xor.
template <class T>
__global__ void shuffle(T* out, int kind, unsigned mask, int argument, int width) {
  const unsigned t = threadIdx.x;
  if (!(mask >> t % 32 & 1)) return;
  const T own = T(t + 100);
  if (kind == 0) out[t] = __shfl_sync(mask, own, argument, width);
  if (kind == 1) out[t] = __shfl_up_sync(mask, own, argument, width);
  if (kind == 2) out[t] = __shfl_down_sync(mask, own, argument, width);
  if (kind == 3) out[t] = __shfl_xor_sync(mask, own, argument, width);
}

__global__ void vote(unsigned* out, unsigned mask, unsigned yes) {
  const unsigned lane = threadIdx.x % 32;
  if (!(mask >> lane & 1)) return;
  out[threadIdx.x * 3] = __ballot_sync(mask, yes >> lane & 1);
  out[threadIdx.x * 3 + 1] = unsigned(__any_sync(mask, yes >> lane & 1));
  out[threadIdx.x * 3 + 2] = unsigned(__all_sync(mask, yes >> lane & 1));
}

// Halves of a warp that meet among themselves, in turns of their own, and then together.
__global__ void halves(int* out) {
  const unsigned t = threadIdx.x, mask = t < 16 ? 0xffffu : 0xffff0000u;
  int sum = int(t);
  for (unsigned turn = 0; turn <= t / 16; ++turn) {
    for (int by = 8; by; by /= 2) sum += __shfl_xor_sync(mask, sum, by);
    __syncwarp(mask);
  }
  out[t] = __shfl_sync(0xffffffffu, sum, int(31 - t));
}

// Each thread reads what the next one has written, round after round.
__global__ void ring(int* out, int rounds, bool barriers) {
  int* shared = reinterpret_cast<int*>(tlfast_shared);
  const unsigned t = threadIdx.x, n = blockDim.x;
  shared[t] = int(t);
  for (int round = 0; round < rounds; ++round) {
    __syncthreads();
    const int next = shared[(t + 1) % n];
    if (barriers) __syncthreads();
    shared[t] = next + 1;
  }
  out[blockIdx.x * n + t] = shared[t];
}

template <class T>
__global__ void unwritten(T* out) {
  __shared__ T fixed[4];
  const unsigned at = blockIdx.x * 8 + threadIdx.x;
  out[at] = fixed[threadIdx.x];
  out[at + 4] = reinterpret_cast<T*>(tlfast_shared)[threadIdx.x];
  fixed[threadIdx.x] = reinterpret_cast<T*>(tlfast_shared)[threadIdx.x] = T(1);
}

// The number of each thread, in the order in which they got to each of the steps: first, after a barrier, after a warp.
__global__ void queue(unsigned* out, unsigned* n) {
  for (int step = 0; step < 3; ++step) {
    out[atomicAdd(n, 1u)] = threadIdx.x;
    if (step == 0) __syncthreads();
    if (step == 1) __syncwarp();
  }
}

__global__ void nothing() {}

__global__ void load_four(float4* out, const float* in) { *out = __ldg(reinterpret_cast<const float4*>(in)); }

template <class From, class To>
__global__ void convert(To* out, const From* in, int64_t n) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= n) return;
  if constexpr (sizeof(From) == 2)
    out[i] = tlfast::widen(in[i]);
  else
    out[i] = tlfast::Narrow<To>::of(in[i]);
}

template <class From, class To>
void launch_convert(void* out, const void* in, int64_t n) {
  simt::launch(convert<From, To>, dim3(unsigned((n + 255) / 256)), 256, 0, nullptr, static_cast<To*>(out),
               static_cast<const From*>(in), n);
}

}  // namespace

#define API extern "C" __attribute__((visibility("default")))

API int run_who_am_i(void* out, const unsigned* s) {
  simt::launch(who_am_i, dim3(s[0], s[1], s[2]), dim3(s[3], s[4], s[5]), 0, nullptr, static_cast<Everyone*>(out));
  return cudaGetLastError();
}
API int run_shuffle(void* out, int type, int n, int kind, unsigned mask, int argument, int width) {
  if (type == 0) simt::launch(shuffle<int>, 1, n, 0, nullptr, static_cast<int*>(out), kind, mask, argument, width);
  if (type == 1) simt::launch(shuffle<float>, 1, n, 0, nullptr, static_cast<float*>(out), kind, mask, argument, width);
  if (type == 2)
    simt::launch(shuffle<double>, 1, n, 0, nullptr, static_cast<double*>(out), kind, mask, argument, width);
  if (type == 3)
    simt::launch(shuffle<long long>, 1, n, 0, nullptr, static_cast<long long*>(out), kind, mask, argument, width);
  return cudaGetLastError();
}
API int run_vote(unsigned* out, int n, unsigned mask, unsigned yes) {
  simt::launch(vote, 1, n, 0, nullptr, out, mask, yes);
  return cudaGetLastError();
}
API int run_halves(int* out) {
  simt::launch(halves, 1, 32, 0, nullptr, out);
  return cudaGetLastError();
}
API int run_ring(int* out, unsigned blocks, unsigned n, int rounds, int barriers) {
  simt::launch(ring, blocks, n, n * sizeof(int), nullptr, out, rounds, barriers != 0);
  return cudaGetLastError();
}
API int run_unwritten(void* out, int type, unsigned blocks) {
  if (type == 0) simt::launch(unwritten<int>, blocks, 4, 4 * sizeof(int), nullptr, static_cast<int*>(out));
  if (type == 2) simt::launch(unwritten<double>, blocks, 4, 4 * sizeof(double), nullptr, static_cast<double*>(out));
  return cudaGetLastError();
}
API int run_queue(unsigned* out, unsigned n_threads) {
  unsigned n = 0;
  simt::launch(queue, 1, n_threads, 0, nullptr, out, &n);
  return cudaGetLastError();
}
API int run_nothing(const unsigned* s, size_t shared_bytes, int opt_in) {
  if (cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, opt_in)) return -1;
  simt::launch(nothing, dim3(s[0], s[1], s[2]), dim3(s[3], s[4], s[5]), shared_bytes, nullptr);
  const int seen = cudaPeekAtLastError(), error = cudaGetLastError();
  return seen == error && cudaGetLastError() == cudaSuccess ? error : -2;
}
API int run_load_four(float* out, const float* in) {
  simt::launch(load_four, 1, 1, 0, nullptr, reinterpret_cast<float4*>(out), in);
  return cudaGetLastError();
}
API int run_convert(void* out, const void* in, int64_t n, int kind) {
  if (kind == 0) launch_convert<tlfast::bf16, float>(out, in, n);
  if (kind == 1) launch_convert<tlfast::f16, float>(out, in, n);
  if (kind == 2) launch_convert<float, tlfast::bf16>(out, in, n);
  if (kind == 3) launch_convert<float, tlfast::f16>(out, in, n);
  return cudaGetLastError();
}
API int device_answers(int* out) {
  cudaGetDeviceCount(&out[0]);
  cudaRuntimeGetVersion(&out[1]);
  cudaDeviceGetAttribute(&out[2], cudaDevAttrComputeCapabilityMajor, 0);
  return cudaDeviceGetAttribute(&out[3], cudaDevAttrMultiProcessorCount, 0);
}
