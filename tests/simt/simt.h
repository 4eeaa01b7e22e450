// CUDA's language and API as plain C++, so that a .cu file runs on the CPU: g++ -x c++ -include simt.h.
//
// What runs here is the kernels' own source: their indices, tails, masks, fixed orders of addition, barriers, and what
// they read and write. A collective that some thread never joins, a mask without its caller, an address that isn't
// aligned, a store behind the dynamic shared memory, and shared memory that is read before it is written (it holds all
// bits set, a NaN) are errors or wrong results; built with AddressSanitizer also an access outside of an allocation.
// What this cannot show: one thread runs at a time and is left only at a collective, so the memory model, races inside
// a warp and waiting for a flag in memory don't exist; a race across a missing barrier shows only if some order of the
// threads makes the result differ. Blocks run one after the other. There is no time, no cache, no coalescing, no limit
// of registers, no occupancy, and a stream is a number: everything is done when the call returns. g++ compiles, not
// nvcc: its roundings are the same for + - * / and sqrt, without fused multiply-add, and for nothing else.
// Stricter than a GPU: a thread that has exited counts as missing at a barrier and in a mask, and __syncthreads in two
// places of the source never meet.
#pragma once

// All that may be included later and uses __noinline__ in an attribute of its own.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "scheduler.h"

#define __global__
#define __device__
#define __host__
#define __constant__ const
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
// In a function it means static; unlike static it may follow extern, and all such variables lie side by side in one
// block of memory, also those of templates: that is how they are found to be poisoned.
#define __shared__ thread_local

constexpr int warpSize = 32;

namespace simt {
constexpr size_t kSharedMost = 227 << 10;    // bytes a block may ask for on compute capability 9.0
constexpr size_t kSharedDefault = 48 << 10;  // without cudaFuncAttributeMaxDynamicSharedMemorySize
constexpr size_t kSharedZone = 1 << 10;      // watched bytes behind what a block has asked for
}  // namespace simt

// What `extern __shared__ unsigned char tlfast_shared[];` of a kernel names, at file scope.
extern thread_local unsigned char tlfast_shared[simt::kSharedMost + simt::kSharedZone];

// ------------------------------------------------------------------------------------------------------------ vectors

struct __align__(8) int2 {
  int x, y;
};
struct __align__(16) int4 {
  int x, y, z, w;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(16) double2 {
  double x, y;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline double2 make_double2(double x, double y) { return {x, y}; }

// -------------------------------------------------------------------------------------------------------- collectives

inline void __syncthreads(const simt::Site& site = simt::Site::current()) {
  simt::meet(simt::Meet::barrier, 0, 0, 0, site);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, const simt::Site& site = simt::Site::current()) {
  simt::meet(simt::Meet::warp, mask, 0, simt::lane(), site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return unsigned(simt::meet(simt::Meet::ballot, mask, predicate != 0, simt::lane(), site));
}
inline int __any_sync(unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::meet(simt::Meet::any, mask, predicate != 0, simt::lane(), site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, const simt::Site& site = simt::Site::current()) {
  return simt::meet(simt::Meet::all, mask, predicate != 0, simt::lane(), site) == mask;
}
// Which lanes run together is the scheduler's choice: here never more than one.
inline unsigned __activemask() { return 1u << simt::lane(); }

namespace simt {

template <class T>
concept Shuffled = std::is_arithmetic_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

template <Shuffled T>
T shuffle(Meet kind, unsigned mask, T value, unsigned source, const Site& site) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet(kind, mask, bits, source, site);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// The first lane of this lane's part of the warp.
inline unsigned part(int width) {
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("width must be a power of two up to 32, got %d. Leave it out.", width);
  return lane() & ~unsigned(width - 1);
}

}  // namespace simt

template <simt::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, const simt::Site& site = simt::Site::current()) {
  return simt::shuffle(simt::Meet::shuffle, mask, value, simt::part(width) + (unsigned(source) & (width - 1)), site);
}
template <simt::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, const simt::Site& site = simt::Site::current()) {
  const unsigned own = simt::lane(), from = own - simt::part(width) < by ? own : own - by;
  return simt::shuffle(simt::Meet::shuffle_up, mask, value, from, site);
}
template <simt::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   const simt::Site& site = simt::Site::current()) {
  const unsigned own = simt::lane(), rest = simt::part(width) + width - 1 - own;
  return simt::shuffle(simt::Meet::shuffle_down, mask, value, by > rest ? own : own + by, site);
}
template <simt::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32, const simt::Site& site = simt::Site::current()) {
  const unsigned own = simt::lane(), other = own ^ unsigned(with);
  const bool beyond = other > simt::part(width) + width - 1;
  return simt::shuffle(simt::Meet::shuffle_xor, mask, value, beyond ? own : other, site);
}

// ----------------------------------------------------------------------------------------------------- memory, numbers

template <class T>
T simt_add(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
inline int atomicAdd(int* address, int value) { return simt_add(address, value); }
inline unsigned atomicAdd(unsigned* address, unsigned value) { return simt_add(address, value); }
inline unsigned long long atomicAdd(unsigned long long* address, unsigned long long value) {
  return simt_add(address, value);
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
template <class T>
void __stcg(T* address, T value) {
  *address = value;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
using std::max;
using std::min;

#include "runtime.h"
