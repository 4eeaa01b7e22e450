// What the CUDA kernels are made of: how a call is cut, loads and stores, where results go; knows no torch.
#pragma once

#include "capture_cuda.h"

namespace tlfast::cuda {

constexpr unsigned kAll = 0xffffffffu;  // every lane of a warp
constexpr int kLanesOfWarp = 32;
constexpr int kMostWarps = 8;     // of a block of the column kernel
constexpr int kBlocksAtOnce = 3;  // on a multiprocessor, at least: leaves 80 registers a thread, more than all need
constexpr int kPickWarps = 8;     // of a block of the row and the pick kernel
constexpr int kInFlight = 4;      // 16-byte loads before the first is used: 48 KiB for three blocks of 8 warps
constexpr int kPieceLoads = 4;    // the same for a lane of the row and the pick kernel
constexpr int kLoadBytes = 16;    // the widest load of a thread

// Division by a number that the host knows: a division of 64 bits is a call on the device, and costs registers.
// n / by = high word of n * magic, shifted: exact for 0 <= n < 2^63. Source: Granlund and Montgomery, "Division by
// Invariant Integers using Multiplication" (1994), theorem 4.2 with N = 63.
struct Divisor {
  uint64_t magic;
  int shift;  // -1: by is 1

  static Divisor of(int64_t by) {
    if (by <= 1) return {0, -1};                              // nothing has no index that would be divided
    const int bits = 64 - __builtin_clzll(uint64_t(by - 1));  // by <= 2^bits
    const auto power = static_cast<unsigned __int128>(1) << (63 + bits);
    return {uint64_t((power + uint64_t(by) - 1) / uint64_t(by)), bits - 1};
  }
  TLFAST_INLINE int64_t operator()(int64_t n) const {
    if (shift < 0) return n;
#if defined(__CUDA_ARCH__)
    return int64_t(__umul64hi(uint64_t(n), magic) >> shift);
#else
    return int64_t(uint64_t((static_cast<unsigned __int128>(uint64_t(n)) * magic) >> 64) >> shift);
#endif
  }
};

// How a call is cut into blocks; made from its sizes and alignment.
struct Cut {
  int tile;           // columns: lanes along the inner dimension; the other lanes of a warp take other reduced rows
  int warps;          // that work on one result
  int splits;         // parts of the reduced dimension, each with partial results of its own
  int64_t per_split;  // reduced rows, or pieces of them, in a part
  int64_t n_across;   // tiles or pieces of the inner dimension
  int64_t n_items;    // what the first grid dimension walks over
  Divisor by_across, by_width;  // n_across; the results of one outer index
  Divisor by_gathered;          // outer indices of one position of a gather
  Divisor by_outer[Dims::kMost], by_reduced[Dims::kMost];
};

// Where the n-th index of some dimensions lies, in row-major order.
__device__ __forceinline__ Offsets offsets_of(const Dims& dims, const Divisor* by, int64_t n) {
  Offsets at{0, 0, 0, 0};
  for (int d = dims.size(); d-- > 0;) {
    const Dim& dim = dims[d];
    const int64_t rest = by[d](n), index = n - rest * dim.size;
    n = rest;
    at.grad += index * dim.grad;
    at.out += index * dim.out;
    at.mask += index * dim.mask;
    at.ref += index * dim.ref;
  }
  return at;
}

// The same for the n-th outer index; where positions say so, the gradient is read elsewhere.
__device__ __forceinline__ Offsets outer_offsets(const CudaCapture& c, const Cut& cut, int64_t n) {
  Offsets at = offsets_of(c.view.outer, cut.by_outer, n);
  if (c.gather.positions) at.grad += c.gather.positions[cut.by_gathered(n)] * c.gather.stride;
  return at;
}

template <class T, int V>
struct alignas(V * sizeof(T) < kLoadBytes ? V * sizeof(T) : kLoadBytes) Pack {
  T values[V];
};

// The stride of the inner dimension: neighbours that are taken in at once lie side by side.
template <int V>
TLFAST_INLINE int64_t stride_of(int64_t stride) {
  return V > 1 ? 1 : stride;
}

// V neighbours: in one load where the address allows it (kWide), else one by one, in the same order.
template <bool kWide, class T, int V>
__device__ __forceinline__ Pack<T, V> load(const T* from) {
  Pack<T, V> pack;
  if constexpr (kWide && V * sizeof(T) == kLoadBytes) {
    const uint4 bits = __ldg(reinterpret_cast<const uint4*>(from));
    std::memcpy(&pack, &bits, sizeof(pack));
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) pack.values[j] = from[j];
  }
  return pack;
}

// What was loaded, or zeros, which change no sum and no maximum.
template <class T, int V>
__device__ __forceinline__ Pack<T, V> only_if(bool wanted, const Pack<T, V>& held) {
  Pack<T, V> kept;
#pragma unroll
  for (int j = 0; j < V; ++j) kept.values[j] = wanted ? held.values[j] : T{};
  return kept;
}

// What two operands are loaded for, where else the gradient's type stands: their product.
template <class G, class F>
struct Product {};

// The load policy of a kernel: V neighbours of the gradient by itself,
template <class L>
struct Source {
  using G = L;
  using A = typename AccumulatorOf<G>::type;
  template <int V>
  using Held = Pack<G, V>;
  const G* grad;

  static __device__ __forceinline__ Source of(const CudaCapture& c, const Offsets& at) {
    return {static_cast<const G*>(c.grad) + at.grad};
  }
  template <int V>  // `n` neighbours further along the inner dimension
  __device__ __forceinline__ Source along(const Dim& inner, int64_t n) const {
    return {grad + n * stride_of<V>(inner.grad)};
  }
  template <bool kWide, int V>  // those of the reduced row `n` of a dimension
  __device__ __forceinline__ Held<V> row(const Dim& reduced, int64_t n) const {
    return load<kWide, G, V>(grad + n * reduced.grad);
  }
  template <bool kWide, int V>
  __device__ __forceinline__ Held<V> at(const Offsets& from) const {
    return load<kWide, G, V>(grad + from.grad);
  }
  template <int V>
  static __device__ __forceinline__ A value(const Held<V>& held, int j) {
    return A(widen(held.values[j]));
  }
  // The same, or zero, which changes no sum and no maximum.
  template <int V>
  static __device__ __forceinline__ Held<V> only_if(bool wanted, const Held<V>& held) {
    return cuda::only_if(wanted, held);
  }
};

// or the products of as many neighbours of it and of the second operand.
template <class G_, class F>
struct Source<Product<G_, F>> {
  using G = G_;
  using A = typename AccumulatorOf<G>::type;
  template <int V>
  struct Held {
    Pack<G, V> grad;
    Pack<F, V> ref;
  };
  const G* grad;
  const F* ref;

  static __device__ __forceinline__ Source of(const CudaCapture& c, const Offsets& at) {
    return {static_cast<const G*>(c.grad) + at.grad, static_cast<const F*>(c.ref) + at.ref};
  }
  template <int V>
  __device__ __forceinline__ Source along(const Dim& inner, int64_t n) const {
    return {grad + n * stride_of<V>(inner.grad), ref + n * stride_of<V>(inner.ref)};
  }
  template <bool kWide, int V>
  __device__ __forceinline__ Held<V> row(const Dim& reduced, int64_t n) const {
    return {load<kWide, G, V>(grad + n * reduced.grad), load<kWide, F, V>(ref + n * reduced.ref)};
  }
  template <bool kWide, int V>
  __device__ __forceinline__ Held<V> at(const Offsets& from) const {
    return {load<kWide, G, V>(grad + from.grad), load<kWide, F, V>(ref + from.ref)};
  }
  template <int V>
  static __device__ __forceinline__ A value(const Held<V>& held, int j) {
    return A(widen(held.grad.values[j])) * A(widen(held.ref.values[j]));
  }
  template <int V>
  static __device__ __forceinline__ Held<V> only_if(bool wanted, const Held<V>& held) {
    return {cuda::only_if(wanted, held.grad), cuda::only_if(wanted, held.ref)};
  }
};

// Take neighbours in, each into an accumulator of its own.
template <class R, class S, int V>
__device__ __forceinline__ void take_in(typename S::A (&acc)[V], const typename S::template Held<V>& held) {
#pragma unroll
  for (int j = 0; j < V; ++j) acc[j] = R::step(acc[j], S::template value<V>(held, j));
}

template <class O, class A>
__device__ __forceinline__ bool store_as(void* out, int64_t at, A value) {
  const O stored = Narrow<O>::of(value);
  static_cast<O*>(out)[at] = stored;
  return is_finite(widen(stored));
}

// Store one result; whether it is finite in memory.
template <class A>
__device__ __forceinline__ bool store(Dtype dtype, void* out, int64_t at, A value) {
  switch (dtype) {
    case Dtype::bf16:
      return store_as<bf16>(out, at, value);
    case Dtype::f16:
      return store_as<f16>(out, at, value);
    case Dtype::f64:
      return store_as<double>(out, at, value);
    case Dtype::f32:
      break;
  }
  return store_as<float>(out, at, value);
}

// Elements from `out` to the first row of this step.
__device__ __forceinline__ int64_t first_row(const CudaCapture& c) {
  return c.cursor ? c.cursor[0] * c.row_elements : 0;
}

// Add what the threads of a block saw to the counters; every thread of it comes here.
__device__ __forceinline__ void count(const CudaCapture& c, int64_t nonfinite, int64_t saturated) {
  if (!c.counters) return;
  if (nonfinite) {  // rare
    atomicAdd(reinterpret_cast<unsigned long long*>(c.counters + kNonfinite),
              static_cast<unsigned long long>(nonfinite));
    atomicAdd(reinterpret_cast<unsigned long long*>(c.counters + kSaturated),
              static_cast<unsigned long long>(saturated));
  }
  if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0)
    atomicAdd(reinterpret_cast<unsigned long long*>(c.counters + kWrites), 1ull);
}

TLFAST_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Where reduced row k lies: the common one or no dimension needs no division at all.
__device__ __forceinline__ Offsets reduced_row(const View& v, const Cut& cut, int64_t k) {
  if (v.reduced.size() > 1) return offsets_of(v.reduced, cut.by_reduced, k);
  const Dim along = v.reduced.size() ? v.reduced[0] : Dim{1, 0, 0, 0};
  return {k * along.grad, 0, k * along.mask, k * along.ref};
}

// Finish one result and put it where it belongs: into `out`, or into the scratch of its part.
template <class A>
struct Results {
  const CudaCapture& c;
  const Cut& cut;
  int64_t nonfinite = 0, saturated = 0;

  __device__ __forceinline__ int64_t n_results() const {
    return c.view.n_outer * (c.view.inner_reduced ? 1 : c.view.inner.size);
  }
  __device__ __forceinline__ int64_t* counted() const { return static_cast<int64_t*>(c.scratch); }
  __device__ __forceinline__ A* partial() const {
    return reinterpret_cast<A*>(counted() + cut.splits * c.view.n_outer);
  }
  __device__ __forceinline__ void finished(int64_t at, A acc, int64_t n) {
    const A value = finish(c.reduction, acc, n) * A(c.scale);
    if (store(c.out_dtype, c.out, at, value)) return;
    ++nonfinite;
    saturated += is_finite(value);
  }
  // `split` of result `column` of `outer`, whose place in `out` is `at`.
  __device__ __forceinline__ void take(int64_t split, int64_t outer, int64_t column, int64_t at, A acc, int64_t n) {
    if (cut.splits == 1) return finished(at, acc, n);
    const int64_t width = c.view.inner_reduced ? 1 : c.view.inner.size;
    partial()[split * n_results() + outer * width + column] = acc;
    if (column == 0) counted()[split * c.view.n_outer + outer] = n;
  }
};

}  // namespace tlfast::cuda
