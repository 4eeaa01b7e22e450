// The CUDA kernels: columns, rows, picks, and the merge of what was split; the file is C++ to the SIMT shim of the
// tests.
//
// Which bits come out depends on the sizes and strides alone: every partial result has its place, and they are combined
// in a fixed order. The only atomics count integers.
#pragma once

#include "cuda_results.cuh"

namespace tlfast::cuda {

template <class A>
__device__ __forceinline__ A* shared_partials() {
  extern __shared__ __align__(16) unsigned char tlfast_shared[];
  return reinterpret_cast<A*>(tlfast_shared);
}

// The rows begin, begin + step, ... below `end` of one column, and how many they are. Loads in flight are what makes it
// fast, and the compiler waits behind a load that lies under a condition: so none does. Where there is no row, the
// first one is read once more, and dropped.
template <class R, bool kWide, class S, int V>
__device__ __forceinline__ int64_t take_rows(typename S::A (&acc)[V], const S& source, const Dim& along, int64_t begin,
                                             int64_t end, int64_t step) {
  if (begin >= end) return 0;
  int64_t k = begin;
  typename S::template Held<V> held[kInFlight];
  for (; k + (kInFlight - 1) * step < end; k += kInFlight * step) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) held[i] = source.template row<kWide, V>(along, k + i * step);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) take_in<R, S>(acc, held[i]);
  }
  if (k < end) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      held[i] = source.template row<kWide, V>(along, k + i * step < end ? k + i * step : k);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i)
      if (k + i * step < end) take_in<R, S>(acc, held[i]);
  }
  return (end - begin + step - 1) / step;
}

// The same for the rows that a mask calls real: the bytes of a turn are all asked for before the first is waited for.
template <class R, bool kWide, class S, int V>
__device__ __forceinline__ int64_t take_masked_rows(typename S::A (&acc)[V], const S& source, const Dim& along,
                                                    const uint8_t* mask, int64_t begin, int64_t end, int64_t step) {
  int64_t n = 0;
  for (int64_t k = begin; k < end; k += kInFlight * step) {
    bool real[kInFlight];
    typename S::template Held<V> held[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) real[i] = mask[(k + i * step < end ? k + i * step : k) * along.mask];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      real[i] &= k + i * step < end;
      n += real[i];
      held[i] = source.template row<kWide, V>(along, real[i] ? k + i * step : k);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) take_in<R, S>(acc, S::template only_if<V>(real[i], held[i]));
  }
  return n;
}

// The reduced dimension lies outside of the inner one: a block takes a tile of the inner dimension, and its threads
// take reduced rows in turn. V elements at once, in one load if kWide. L is what is loaded: the gradient's type, or a
// Product.
template <class L, class R, int V, bool kWide>
__global__ void __launch_bounds__(kMostWarps* kLanesOfWarp, kBlocksAtOnce)
    columns(const __grid_constant__ CudaCapture c, const __grid_constant__ Cut cut) {
  using S = Source<L>;
  using A = typename S::A;
  __shared__ int64_t counted[kMostWarps];
  A* const partial = shared_partials<A>();  // [warps][tile * V]
  const View& v = c.view;
  const int lane = threadIdx.x % kLanesOfWarp, warp = threadIdx.x / kLanesOfWarp;
  const int across = lane % cut.tile, rows_of_warp = kLanesOfWarp / cut.tile;
  const int64_t n_at_once = cut.warps * rows_of_warp, split = blockIdx.y;
  const int64_t end = least(v.n_reduced, (split + 1) * cut.per_split);
  const int64_t row_base = first_row(c);
  Results<A> results{c, cut};
  for (int64_t item = blockIdx.x; item < cut.n_items; item += gridDim.x) {
    const int64_t outer = cut.by_across(item), first = (item - outer * cut.n_across) * cut.tile * V;
    const Offsets at = outer_offsets(c, cut, outer);
    const uint8_t* const mask = c.mask ? c.mask + at.mask : nullptr;
    const int64_t mine = first + across * V;
    // Beyond the edge a lane reads what its neighbour reads; nobody asks for its result.
    const S source = S::of(c, at).template along<V>(v.inner, mine < v.inner.size ? mine : first);
    A acc[V] = {};
    int64_t n = 0;
    const int64_t begin = split * cut.per_split + warp * rows_of_warp + lane / cut.tile;
    if (v.reduced.size() <= 1) {
      const Dim& along = v.reduced.size() ? v.reduced[0] : Dim{1, 0, 0, 0};
      if (mask)
        n = take_masked_rows<R, kWide>(acc, source, along, mask, begin, end, n_at_once);
      else
        n = take_rows<R, kWide>(acc, source, along, begin, end, n_at_once);
    } else {  // dimensions that can't be joined: rare, and one row at a time
      for (int64_t k = begin; k < end; k += n_at_once) {
        const Offsets from = offsets_of(v.reduced, cut.by_reduced, k);
        const bool real = !mask || mask[from.mask];
        n += real;
        if (real) take_in<R, S>(acc, source.template at<kWide, V>(from));
      }
    }
    // First over the rows of a warp, then over the warps: always in this order.
    for (int apart = cut.tile; apart < kLanesOfWarp; apart *= 2) {
      n += __shfl_down_sync(kAll, n, apart);
#pragma unroll
      for (int j = 0; j < V; ++j) acc[j] = R::combine(acc[j], __shfl_down_sync(kAll, acc[j], apart));
    }
    if (lane < cut.tile)
#pragma unroll
      for (int j = 0; j < V; ++j) partial[(warp * cut.tile + lane) * V + j] = acc[j];
    if (lane == 0) counted[warp] = n;
    __syncthreads();
    const int64_t n_here = least(int64_t(cut.tile) * V, v.inner.size - first);
    for (int j = threadIdx.x; j < n_here; j += blockDim.x) {
      A sum = partial[j];
      int64_t n_rows = counted[0];
      for (int w = 1; w < cut.warps; ++w) {
        sum = R::combine(sum, partial[w * cut.tile * V + j]);
        n_rows += counted[w];
      }
      results.take(split, outer, first + j, row_base + at.out + (first + j) * v.inner.out, sum, n_rows);
    }
    __syncthreads();  // the next item writes the same shared memory
  }
  if (cut.splits == 1) count(c, results.nonfinite, results.saturated);
}

// The inner dimension itself is reduced: `warps` warps share the pieces of one result.
template <class L, class R, int V, bool kWide>
__global__ void __launch_bounds__(kPickWarps* kLanesOfWarp, kBlocksAtOnce)
    rows(const __grid_constant__ CudaCapture c, const __grid_constant__ Cut cut) {
  using S = Source<L>;
  using A = typename S::A;
  __shared__ int64_t counted[kPickWarps];
  __shared__ A partial[kPickWarps];
  const View& v = c.view;
  const int lane = threadIdx.x % kLanesOfWarp, warp = threadIdx.x / kLanesOfWarp;
  const int n_together = kPickWarps / cut.warps, own = warp / cut.warps, share = warp % cut.warps;
  const int64_t split = blockIdx.y, row_base = first_row(c);
  const int64_t end = least(v.n_reduced * cut.n_across, (split + 1) * cut.per_split);
  Results<A> results{c, cut};
  for (int64_t item = blockIdx.x; item < cut.n_items; item += gridDim.x) {
    const int64_t outer = item * n_together + own;
    const bool there = outer < v.n_outer;
    const Offsets at = outer_offsets(c, cut, there ? outer : 0);
    const S source = S::of(c, at);
    A acc[V] = {};
    int64_t n = 0;
    const int64_t begin = split * cut.per_split + share;
    int64_t k = cut.by_across(begin), part = begin - k * cut.n_across;
    for (int64_t piece = begin; there && piece < end; piece += cut.warps) {
      const Offsets from = reduced_row(v, cut, k);
      const bool real = !c.mask || c.mask[at.mask + from.mask];
      n += real && part == 0 ? v.inner.size : 0;
      if (real) {  // for the whole warp
        typename S::template Held<V> held[kPieceLoads];
#pragma unroll
        for (int i = 0; i < kPieceLoads; ++i) {
          const int64_t mine = ((part * kPieceLoads + i) * kLanesOfWarp + lane) * V;
          held[i] = source.template along<V>(v.inner, mine < v.inner.size ? mine : 0).template at<kWide, V>(from);
        }
#pragma unroll
        for (int i = 0; i < kPieceLoads; ++i) {
          const int64_t mine = ((part * kPieceLoads + i) * kLanesOfWarp + lane) * V;
          take_in<R, S>(acc, S::template only_if<V>(mine < v.inner.size, held[i]));
        }
      }
      for (part += cut.warps; part >= cut.n_across; part -= cut.n_across) ++k;
    }
#pragma unroll
    for (int j = 1; j < V; ++j) acc[0] = R::combine(acc[0], acc[j]);
    for (int apart = kLanesOfWarp / 2; apart > 0; apart /= 2)
      acc[0] = R::combine(acc[0], __shfl_down_sync(kAll, acc[0], apart));
    if (lane == 0) {
      partial[warp] = acc[0];
      counted[warp] = n;
    }
    __syncthreads();
    if (there && share == 0 && lane == 0) {
      A sum = partial[warp];
      for (int w = 1; w < cut.warps; ++w) {
        sum = R::combine(sum, partial[warp + w]);
        n += counted[warp + w];
      }
      results.take(split, outer, 0, row_base + at.out, sum, n);
    }
    __syncthreads();
  }
  if (cut.splits == 1) count(c, results.nonfinite, results.saturated);
}

// The parts of split reductions, combined in their order.
template <class A, class R>
__global__ void merge(const __grid_constant__ CudaCapture c, const __grid_constant__ Cut cut) {
  const View& v = c.view;
  const int64_t width = v.inner_reduced ? 1 : v.inner.size, row_base = first_row(c);
  Results<A> results{c, cut};
  const int64_t n_results = results.n_results();
  for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < n_results;
       i += int64_t(gridDim.x) * blockDim.x) {
    const int64_t outer = cut.by_width(i), column = i - outer * width;
    A sum = results.partial()[i];
    int64_t n = results.counted()[outer];
    for (int64_t split = 1; split < cut.splits; ++split) {
      sum = R::combine(sum, results.partial()[split * n_results + i]);
      n += results.counted()[split * v.n_outer + outer];
    }
    const int64_t along = v.inner_reduced ? 0 : column * v.inner.out;
    results.finished(row_base + offsets_of(v.outer, cut.by_outer, outer).out + along, sum, n);
  }
  count(c, results.nonfinite, results.saturated);
}

// Nothing is added up (`none`, `last`): a warp copies and casts a piece of the inner dimension.
template <class L, class O, int V>
__global__ void __launch_bounds__(kPickWarps* kLanesOfWarp, kBlocksAtOnce)
    picks(const __grid_constant__ CudaCapture c, const __grid_constant__ Cut cut) {
  using S = Source<L>;
  using A = typename S::A;
  const View& v = c.view;
  const int lane = threadIdx.x % kLanesOfWarp;
  const int64_t row_base = first_row(c), n_warps = int64_t(gridDim.x) * kPickWarps;
  const A of_nothing = c.reduction == Reduction::last ? finish(Reduction::last, A(0), 0) : A(0), scale = A(c.scale);
  int64_t nonfinite = 0, saturated = 0;
  for (int64_t item = int64_t(blockIdx.x) * kPickWarps + threadIdx.x / kLanesOfWarp; item < cut.n_items;
       item += n_warps) {
    const int64_t outer = cut.by_across(item), part = item - outer * cut.n_across;
    const Offsets at = outer_offsets(c, cut, outer);
    int64_t k = v.n_reduced - 1;
    if (c.mask) {  // the last real one, 32 at a time from the end
      k = -1;
      for (int64_t behind = v.n_reduced; behind > 0 && k < 0; behind -= kLanesOfWarp) {
        const int64_t mine = behind - 1 - lane;
        const bool real = mine >= 0 && c.mask[at.mask + reduced_row(v, cut, mine).mask];
        const unsigned votes = __ballot_sync(kAll, real);
        if (votes) k = behind - __ffs(int(votes));
      }
    }
    const bool found = k >= 0;
    const Offsets from = found ? reduced_row(v, cut, k) : Offsets{0, 0, 0, 0};
    const S source = S::of(c, at);
    O* const out = static_cast<O*>(c.out) + row_base + at.out;
    typename S::template Held<V> held[kPieceLoads];
    if (found) {  // for the whole warp; nothing may be there to be read otherwise
#pragma unroll
      for (int i = 0; i < kPieceLoads; ++i) {
        const int64_t mine = ((part * kPieceLoads + i) * kLanesOfWarp + lane) * V;
        held[i] = source.template along<V>(v.inner, mine < v.inner.size ? mine : 0).template at<true, V>(from);
      }
    }
#pragma unroll
    for (int i = 0; i < kPieceLoads; ++i) {
      const int64_t mine = ((part * kPieceLoads + i) * kLanesOfWarp + lane) * V;
      if (mine >= v.inner.size) continue;
      Pack<O, V> stored;
      A values[V];
      bool fine = true;
#pragma unroll
      for (int j = 0; j < V; ++j) {
        values[j] = (found ? S::template value<V>(held[i], j) : of_nothing) * scale;
        stored.values[j] = Narrow<O>::of(values[j]);
        fine &= is_finite(widen(stored.values[j]));
      }
      if (!fine) {  // rare, so it is counted apart
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const bool bad = !is_finite(widen(stored.values[j]));
          nonfinite += bad;
          saturated += bad && is_finite(values[j]);
        }
      }
      *reinterpret_cast<Pack<O, V>*>(out + mine * stride_of<V>(v.inner.out)) = stored;
    }
  }
  count(c, nonfinite, saturated);
}

}  // namespace tlfast::cuda
