// Cuts a call into blocks and launches the CUDA kernels: the C interface of capture_cuda.h.
#include <type_traits>

#include "capture_cuda.cuh"
#include "choose.h"

#include <cuda_runtime.h>

#include <algorithm>

namespace tlfast::cuda {
namespace {

// The cut depends on sizes alone, never on the GPU, so that another GPU gives the same bits. These four are reckoned
// for an H200 (132 multiprocessors, 4.8 TB/s by its data sheet; 0.8 us of latency assumed), not measured.
constexpr int64_t kManyBlocks = 256;            // two for nearly every multiprocessor: 4.2 MB in flight
constexpr int64_t kFewBlocks = 128;             // fewer leave multiprocessors idle
constexpr int64_t kWorthSplitting = 128 << 10;  // bytes of a block: 6 us, the time of two launches
constexpr int64_t kPart = 32 << 10;             // bytes that a part of a split reduction has at least
constexpr int64_t kMostSplits = 64;             // the merge reads as many numbers for each result
constexpr int64_t kMostBlocks = 1 << 30;        // of the first grid dimension, whose limit is 2^31 - 1
constexpr int kMergeThreads = 256;
constexpr int kLeastTile = 8;  // lanes: 128 bytes, a line of L2

// Two limits of a launch that hold on every GPU from sm_80 on and with every driver: bytes of its arguments, and of
// shared memory that need not be asked for. Source: "Compute Capabilities" in the CUDA C++ Programming Guide.
constexpr size_t kMostArguments = 4096, kMostShared = 48 << 10;
static_assert(sizeof(CudaCapture) + sizeof(Cut) <= kMostArguments);
// Of the column kernel, where each of 256 threads has as many results as a load has elements; 2 bytes are the smallest.
static_assert(kMostWarps * kLanesOfWarp * (kLoadBytes / 2) * sizeof(float) + kMostWarps * sizeof(int64_t) <=
              kMostShared);
static_assert(kMostWarps * kLanesOfWarp * (kLoadBytes / 8) * sizeof(double) <= kMostShared);

int64_t over(int64_t n, int64_t by) { return (n + by - 1) / by; }

size_t size_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2; }

bool all_divide(const Dims& dims, int64_t Dim::* stride, int64_t by) {
  for (int d = 0; d < dims.size(); ++d)
    if (dims[d].*stride % by) return false;
  return true;
}

bool lies_in_vectors(const View& view, int64_t Dim::* stride, int64_t v) {
  return view.inner.*stride == 1 && all_divide(view.outer, stride, v) && all_divide(view.reduced, stride, v);
}

// Whether `v` neighbours of the inner dimension lie side by side everywhere. It decides the order of additions, so it
// asks for dtypes, sizes and strides alone; the address decides only how the neighbours are loaded. Two operands of
// different dtypes are taken in one by one: kernels for each pair would be most of all, and a point's gradient and
// activation have one dtype.
bool lies_in_vectors(const CudaCapture& c, int64_t v) {
  return c.view.inner.size % v == 0 && lies_in_vectors(c.view, &Dim::grad, v) && c.gather.stride % v == 0 &&
         (!c.ref || (c.ref_dtype == c.grad_dtype && lies_in_vectors(c.view, &Dim::ref, v)));
}

bool loads_wide(const CudaCapture& c) {
  return reinterpret_cast<uintptr_t>(c.grad) % kLoadBytes == 0 && reinterpret_cast<uintptr_t>(c.ref) % kLoadBytes == 0;
}

// Whether `v` results can be stored at once everywhere.
bool stores_vectors(const CudaCapture& c, int64_t v) {
  const int64_t widest = std::min<int64_t>(kLoadBytes, v * int64_t(size_of(c.out_dtype)));
  return c.view.inner.out == 1 && reinterpret_cast<uintptr_t>(c.out) % widest == 0 &&
         c.row_elements * int64_t(size_of(c.out_dtype)) % widest == 0 &&  // also without a cursor: see docs/design.md
         all_divide(c.view.outer, &Dim::out, v);
}

void split(Cut& cut, int64_t n_blocks, int64_t n_parts, int64_t bytes_of_part) {
  cut.splits = 1;
  const int64_t bytes = n_parts * bytes_of_part;
  if (n_blocks < kFewBlocks && bytes >= kWorthSplitting)
    cut.splits = int(std::min({over(kManyBlocks, n_blocks), bytes / kPart, kMostSplits}));
  cut.per_split = over(n_parts, cut.splits);
  cut.splits = int(std::max<int64_t>(1, cut.per_split ? over(n_parts, cut.per_split) : 1));
}

// One part, and the divisors of what `n_across` and the view say.
Cut whole(const View& v, int64_t n_gathered, int tile, int64_t n_across) {
  Cut cut{};
  cut.tile = tile;
  cut.warps = cut.splits = 1;
  cut.n_across = n_across;
  cut.n_items = v.n_outer * n_across;
  cut.by_across = Divisor::of(n_across);
  cut.by_gathered = Divisor::of(v.n_outer / n_gathered);
  cut.by_width = Divisor::of(v.inner_reduced ? 1 : v.inner.size);
  for (int d = 0; d < v.outer.size(); ++d) cut.by_outer[d] = Divisor::of(v.outer[d].size);
  for (int d = 0; d < v.reduced.size(); ++d) cut.by_reduced[d] = Divisor::of(v.reduced[d].size);
  return cut;
}

Cut cut_columns(const View& v, int64_t n_gathered, int64_t width, int64_t element_bytes) {
  int tile = kLanesOfWarp;
  while (tile > kLeastTile && v.n_outer * over(width, tile) < kManyBlocks) tile /= 2;
  Cut cut = whole(v, n_gathered, tile, over(width, tile));
  const int64_t rows_of_warp = kLanesOfWarp / cut.tile;
  while (cut.warps < kMostWarps && cut.warps * rows_of_warp * kInFlight < v.n_reduced) cut.warps *= 2;
  split(cut, cut.n_items, v.n_reduced, std::min(width, int64_t(cut.tile)) * element_bytes);
  return cut;
}

Cut cut_rows(const View& v, int64_t n_gathered, int64_t width, int64_t element_bytes) {
  Cut cut = whole(v, n_gathered, kLanesOfWarp, over(width, kLanesOfWarp * kPieceLoads));
  const int64_t n_pieces = v.n_reduced * cut.n_across;
  cut.warps = n_pieces > kPieceLoads ? kPickWarps : 1;
  cut.n_items = over(v.n_outer, kPickWarps / cut.warps);
  split(cut, cut.n_items, n_pieces, std::min<int64_t>(width, kLanesOfWarp * kPieceLoads) * element_bytes);
  return cut;
}

bool picks_one(Reduction reduction) { return reduction == Reduction::none || reduction == Reduction::last; }

// How many elements of a reduction are taken in at once.
int64_t vector_of(const CudaCapture& c) {
  const int64_t v = kLoadBytes / int64_t(size_of(c.grad_dtype));
  return lies_in_vectors(c, v) ? v : 1;
}

Cut cut_of(const CudaCapture& c) {
  const int64_t vector = vector_of(c), width = over(c.view.inner.size, vector);
  const int64_t bytes = vector * int64_t(size_of(c.grad_dtype));
  return c.view.inner_reduced ? cut_rows(c.view, c.gather.n, width, bytes)
                              : cut_columns(c.view, c.gather.n, width, bytes);
}

int64_t scratch_of(const CudaCapture& c, const Cut& cut) {
  if (cut.splits == 1) return 0;
  const int64_t width = c.view.inner_reduced ? 1 : c.view.inner.size;
  const int64_t accumulator = c.grad_dtype == Dtype::f64 ? sizeof(double) : sizeof(float);
  return cut.splits * c.view.n_outer * (int64_t(sizeof(int64_t)) + width * accumulator);
}

template <class... Params, class... Args>
cudaError_t launch(void (*kernel)(Params...), int64_t n_blocks, int splits, int threads, size_t shared, void* stream,
                   const Args&... args) {
  const dim3 grid(unsigned(std::min(n_blocks, kMostBlocks)), unsigned(splits)), block(static_cast<unsigned>(threads));
  static_assert((std::is_same_v<std::remove_const_t<Params>, Args> && ...));  // what is pointed to is read as that
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  cudaLaunchKernel(kernel, grid, block, pointers, shared, static_cast<cudaStream_t>(stream));
  return cudaGetLastError();
}

template <class L, class R, int V, bool kWide>
cudaError_t reduce(const CudaCapture& c, void* stream) {
  using A = typename Source<L>::A;
  const Cut cut = cut_of(c);
  cudaError_t error;
  if (c.view.inner_reduced) {
    error = launch(rows<L, R, V, kWide>, cut.n_items, cut.splits, kPickWarps * kLanesOfWarp, 0, stream, c, cut);
  } else {
    const size_t shared = size_t(cut.warps) * cut.tile * V * sizeof(A);
    error = launch(columns<L, R, V, kWide>, cut.n_items, cut.splits, cut.warps * kLanesOfWarp, shared, stream, c, cut);
  }
  if (error || cut.splits == 1) return error;
  const int64_t n_results = c.view.n_outer * (c.view.inner_reduced ? 1 : c.view.inner.size);
  return launch(merge<A, R>, over(n_results, kMergeThreads), 1, kMergeThreads, 0, stream, c, cut);
}

// The most elements that a kernel takes in at once.
template <class L>
constexpr int kMostAtOnce = kLoadBytes / sizeof(L);
template <class G, class F>
constexpr int kMostAtOnce<Product<G, F>> = std::is_same_v<G, F> ? kLoadBytes / sizeof(G) : 1;

template <class L, class R>
cudaError_t pick_width(const CudaCapture& c, void* stream) {
  constexpr int kVector = kMostAtOnce<L>;
  if constexpr (kVector > 1) {
    if (vector_of(c) > 1)
      return loads_wide(c) ? reduce<L, R, kVector, true>(c, stream) : reduce<L, R, kVector, false>(c, stream);
  }
  return reduce<L, R, 1, false>(c, stream);
}

template <class L, class O>
cudaError_t pick(const CudaCapture& c, void* stream) {
  constexpr int kVector = kMostAtOnce<L>;
  const auto go = [&](auto kernel, int64_t v) {
    const Cut cut =
        whole(c.view, c.gather.n, kLanesOfWarp, over(over(c.view.inner.size, v), kLanesOfWarp * kPieceLoads));
    return launch(kernel, over(cut.n_items, kPickWarps), 1, kPickWarps * kLanesOfWarp, 0, stream, c, cut);
  };
  const bool vectors = lies_in_vectors(c, kVector) && loads_wide(c) && stores_vectors(c, kVector);
  return vectors ? go(picks<L, O, kVector>, kVector) : go(picks<L, O, 1>, 1);
}

// A float64 result comes of float64 gradients alone: the other kernels aren't made.
template <class L>
cudaError_t pick_stored(const CudaCapture& c, void* stream) {
  return with_dtype(c.out_dtype, [&](auto stored) {
    using O = typename decltype(stored)::type;
    if constexpr (sizeof(O) <= sizeof(typename Source<L>::A))
      return pick<L, O>(c, stream);
    else
      return cudaErrorInvalidValue;
  });
}

template <class L>
constexpr bool kReducesAll = true;
template <class G, class F>
constexpr bool kReducesAll<Product<G, F>> = false;  // see reduces_products

template <class L>
cudaError_t pick_reduction(const CudaCapture& c, void* stream) {
  return with_reduction(c.reduction, [&](auto reduction) {
    using R = typename decltype(reduction)::type;
    if constexpr (std::is_same_v<R, Keep>)
      return pick_stored<L>(c, stream);
    else if constexpr (std::is_same_v<R, Add> || kReducesAll<L>)
      return pick_width<L, R>(c, stream);
    else
      return cudaErrorInvalidValue;
  });
}

template <class G>
cudaError_t pick_operands(const CudaCapture& c, void* stream) {
  if (!c.ref) return pick_reduction<G>(c, stream);
  return with_dtype(c.ref_dtype,
                    [&](auto ref) { return pick_reduction<Product<G, typename decltype(ref)::type>>(c, stream); });
}

__global__ void set_cursor(int64_t* cursor, int64_t row) { cursor[0] = row; }
__global__ void advance(int64_t* cursor, int64_t n_rows) { cursor[0] += n_rows; }

}  // namespace
}  // namespace tlfast::cuda

using namespace tlfast::cuda;

int64_t tlfast_cuda_scratch_bytes(const tlfast::CudaCapture* call) {
  if (picks_one(call->reduction)) return 0;
  return scratch_of(*call, cut_of(*call));
}

int tlfast_cuda_capture(const tlfast::CudaCapture* call, void* stream) {
  return tlfast::with_dtype(call->grad_dtype,
                            [&](auto grad) { return pick_operands<typename decltype(grad)::type>(*call, stream); });
}

int tlfast_cuda_set_cursor(int64_t* cursor, int64_t row, void* stream) {
  return launch(set_cursor, 1, 1, 1, 0, stream, cursor, row);
}

int tlfast_cuda_advance(int64_t* cursor, int64_t n_rows, void* stream) {
  return launch(advance, 1, 1, 1, 0, stream, cursor, n_rows);
}

const char* tlfast_cuda_error(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

tlfast::CudaStatus tlfast_cuda_status() {
  tlfast::CudaStatus status{};
  status.built = true;
  status.error = cudaGetDeviceCount(&status.n_devices);
  cudaDriverGetVersion(&status.driver);
  cudaRuntimeGetVersion(&status.runtime);
  cudaGetLastError();  // an answer, not a failure of what comes next
  return status;
}

int tlfast_cuda_capability(int device, int* major, int* minor) {
  const int error = cudaDeviceGetAttribute(major, cudaDevAttrComputeCapabilityMajor, device);
  const int next = error ? error : int(cudaDeviceGetAttribute(minor, cudaDevAttrComputeCapabilityMinor, device));
  cudaGetLastError();  // an answer, not a failure of what this thread launches next
  return next;
}
