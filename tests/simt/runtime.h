// The host's side of CUDA's API, as far as a file of kernels needs it: answers, copies, launches.
#pragma once

// Values of driver_types.h.
enum cudaError_t : int {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorLaunchFailure = 719,
};
enum cudaDeviceAttr : int {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
enum cudaFuncAttribute : int { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
enum cudaMemcpyKind : int {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
using cudaStream_t = struct CUstream_st*;

namespace simt {
inline cudaError_t last_error = cudaSuccess;
inline const void* last_kernel = nullptr;  // that was launched
inline std::map<const void*, size_t> shared_limits;  // of kernels that have asked for one
}  // namespace simt

inline cudaError_t cudaPeekAtLastError() { return simt::last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(simt::last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetDeviceCount(int* n) { return *n = 1, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return *value = 4, cudaSuccess;  // few, so that small tensors get to the ways for many blocks
    case cudaDevAttrComputeCapabilityMajor:
      return *value = 9, cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      return *value = 0, cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return *value = int(simt::kSharedMost), cudaSuccess;
  }
  return cudaErrorInvalidValue;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || size_t(value) > simt::kSharedMost) return cudaErrorInvalidValue;
  simt::shared_limits[reinterpret_cast<const void*>(kernel)] = size_t(value);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t n, cudaMemcpyKind, cudaStream_t = nullptr) {
  return std::memcpy(to, from, n), cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int byte, size_t n, cudaStream_t = nullptr) {
  return std::memset(to, byte, n), cudaSuccess;
}

namespace simt {

// kernel<<<grid, block, shared_bytes, stream>>>(values...); what went wrong is told by cudaGetLastError.
template <class... Parameters, class... Values>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
            Values&&... values) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::decay_t<Parameters>...> parameters;
  } call{kernel, {std::forward<Values>(values)...}};
  const auto limit = shared_limits.find(reinterpret_cast<const void*>(kernel));
  last_kernel = reinterpret_cast<const void*>(kernel);
  int error = cudaErrorInvalidValue;
  if (shared_bytes <= (limit == shared_limits.end() ? kSharedDefault : limit->second)) {
    const auto one_thread = [](void* call) {
      std::apply(static_cast<Call*>(call)->kernel, static_cast<Call*>(call)->parameters);
    };
    error = run(grid, block, shared_bytes, one_thread, &call);
  }
  if (error) last_error = cudaError_t(error);
}

}  // namespace simt

// The same with pointers to the values, which are of the kernel's types.
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** values, size_t shared_bytes,
                             cudaStream_t stream) {
  const auto all = [&]<size_t... I>(std::index_sequence<I...>) {
    simt::launch(kernel, grid, block, shared_bytes, stream, *static_cast<std::decay_t<Parameters>*>(values[I])...);
  };
  all(std::index_sequence_for<Parameters...>());
  return cudaPeekAtLastError();
}
