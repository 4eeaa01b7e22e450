// The CPU kernels: vectorised by the compiler for several instruction sets, chosen at run time.
//
// A task is one outer index and a block of the inner dimension. It keeps one accumulator an element in the L1 cache and
// streams the reduced rows through it, so that each byte of the gradient is read once, in order. Where the inner
// dimension itself is reduced, a fixed number of lanes stands in for the block and is folded at the end. What is
// streamed, the gradient or its product with a second operand, is a policy of operands.h.
#include "capture_cpu.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>

#include "choose.h"
#include "operands.h"

namespace tlfast {
namespace {

constexpr int64_t kBlock = 2048;   // accumulators of a task: 8 KiB of the L1 cache in float32
constexpr int64_t kCut = 64;       // elements; where few outer indices are to keep many threads busy
constexpr int64_t kShort = 1024;   // elements of a row that is reduced among others
constexpr int64_t kGrain = 32768;  // elements worth a thread, as at::internal::GRAIN_SIZE
// Bytes above which the next four rows are fetched into L2 ahead of use, half of a common L2: a gradient that lies in
// a cache is up to 15 % slower for it, one that doesn't up to 2.5 times as fast (bench kernel).
constexpr int64_t kHot = 512 << 10;

// The reduced rows that the mask lets through, a few at a time. kPair: in both operands.
template <bool kPair, class Use>
int64_t for_real_rows(const View& view, const uint8_t* mask, bool last_only, Use use) {
  RowOffsets rows;
  int64_t n = 0;
  if (!mask && !last_only && view.reduced.size() <= 1) {  // the common case, without the walk
    const Dim along = view.reduced.size() ? view.reduced[0] : Dim{1, 0, 0, 0};
    for (; n < view.n_reduced; n += rows.n) {
      rows.n = std::min(RowOffsets::kMost, view.n_reduced - n);
      for (int64_t k = 0; k < rows.n; ++k) rows.grad[k] = (n + k) * along.grad;
      for (int64_t k = 0; kPair && k < rows.n; ++k) rows.ref[k] = (n + k) * along.ref;
      use(rows);
    }
    return n;
  }
  Walk walk(view.reduced);
  for (int64_t k = 0; k < view.n_reduced; ++k, walk.next()) {
    if (mask && !mask[walk.mask]) continue;
    ++n;
    rows.n = last_only ? 0 : rows.n;
    if (kPair) rows.ref[rows.n] = walk.ref;
    rows.grad[rows.n++] = walk.grad;
    if (rows.n == RowOffsets::kMost) {
      use(rows);
      rows.n = 0;
    }
  }
  if (rows.n) use(rows);
  return n;
}

// Finish and store the results of a task. It is called through a pointer, once a task: loops over the gradient that
// were compiled anew for each stored dtype would take most of the build's time.
template <class A>
using StoreTask = void (*)(void* out, int64_t at, const A* acc, int64_t length, int64_t stride, Reduction reduction,
                           int64_t n, A scale, Counts* counts);

template <class A, class O>
void store_task(void* out, int64_t at, const A* acc, int64_t length, int64_t stride, Reduction reduction, int64_t n,
                A scale, Counts* counts) {
  O* const o = static_cast<O*>(out) + at;
  if (stride == 1)
    For<Store<A, O, true>>::here(o, acc, length, stride, reduction, n, scale, counts);
  else  // one by one in every instruction set, and large where it is vectorised
    Store<A, O, false>::run(o, acc, length, stride, reduction, n, scale, counts);
}

// Results of short rows, one row each, that are finished and stored together.
template <class A>
struct ShortResults {
  int64_t n = 0, out[RowOffsets::kMost];
  A values[RowOffsets::kMost];
  bool real[RowOffsets::kMost];

  // In runs whose results lie at equal steps.
  template <class Store>
  void store(Store store_run) const {
    for (int64_t first = 0; first < n;) {
      const int64_t step = first + 1 < n ? out[first + 1] - out[first] : 1;
      int64_t end = first + 1;
      while (end < n && out[end] - out[end - 1] == step && real[end] == real[first]) ++end;
      store_run(out[first], values + first, end - first, step, real[first]);
      first = end;
    }
  }
};

// The tasks begin to end, each of which is one short row: reduced many at a time, since what a task costs beside its
// elements is more than these.
template <class R, class Source, class A = typename Source::A>
void run_short(const View& v, Reduction reduction, const Source& source, const Operands& with, StoreTask<A> store,
               int64_t begin, int64_t end, Counts* counts) {
  const auto* const mask = static_cast<const uint8_t*>(with.mask);
  Walk walk(v.outer);
  walk.seek(begin);
  RowOffsets rows;
  ShortResults<A> results;
  A sums[RowOffsets::kMost];
  for (int64_t task = begin; task < end;) {
    rows.n = results.n = 0;
    for (; task < end && results.n < RowOffsets::kMost; ++task, ++results.n, walk.next()) {
      results.out[results.n] = walk.out;
      results.real[results.n] = !mask || mask[walk.mask];
      if (!results.real[results.n]) continue;
      if (Source::kPair) rows.ref[rows.n] = walk.ref;
      rows.grad[rows.n++] = walk.grad + with.gathered(task, v.n_outer);
    }
    source.template short_rows<R>(sums, rows, v.inner);
    for (int64_t k = 0, taken = 0; k < results.n; ++k) results.values[k] = results.real[k] ? sums[taken++] : A(0);
    results.store([&](int64_t at, const A* values, int64_t n, int64_t step, bool real) {
      store(with.out, at, values, n, step, reduction, real ? v.inner.size : 0, A(with.scale), counts);
    });
  }
}

template <class R, class Source, class A = typename Source::A>
Counts run(const View& v, Reduction reduction, const Source& source, const Operands& with, StoreTask<A> store) {
  const auto* const mask = static_cast<const uint8_t*>(with.mask);
  const A scale = A(with.scale);
  const bool row = v.inner_reduced;
  const int64_t whole = row ? 1 : v.inner.size;
  // The cut of the inner dimension changes no result: each of its elements is added up on its own.
  const int64_t shares = (at::get_num_threads() + v.n_outer - 1) / v.n_outer;
  const int64_t share = (whole / shares + kCut) / kCut * kCut;
  const int64_t block = std::min(kBlock, share);
  const int64_t n_blocks = (whole + block - 1) / block;
  const int64_t work = std::max<int64_t>(v.n_reduced, 1) * (row ? v.inner.size : std::min(whole, block));
  const bool ahead = v.n_outer * v.n_reduced * v.inner.size * source.element_bytes() > kHot;
  std::atomic<int64_t> nonfinite{0}, saturated{0};
  const bool is_short = row && v.n_reduced == 1 && v.inner.size <= kShort && source.takes_short(v.inner);

  const auto do_tasks = [&](int64_t begin, int64_t end) {
    alignas(64) A acc[kBlock];
    Counts counts;
    if (is_short) {
      run_short<R>(v, reduction, source, with, store, begin, end, &counts);
      nonfinite += counts.nonfinite;
      saturated += counts.saturated;
      return;
    }
    Walk walk(v.outer);
    walk.seek(begin / n_blocks);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = (task % n_blocks) * block, length = std::min(block, whole - first);
      const int64_t of_grad = walk.grad + with.gathered(task / n_blocks, v.n_outer);
      const Source here = source.from(of_grad + first * v.inner.grad, walk.ref + first * v.inner.ref);
      int64_t n;
      For<Start<A>>::here(acc, row ? kLanes : length);
      const uint8_t* m = mask ? mask + walk.mask : nullptr;
      if (row) {
        n = v.inner.size * for_real_rows<Source::kPair>(v, m, false, [&](const RowOffsets& rows) {
              here.template lanes<R>(acc, rows, v.inner);
            });
        Fold<R, kLanes / 2>::run(acc);
      } else {
        n = for_real_rows<Source::kPair>(v, m, reduction == Reduction::last, [&](const RowOffsets& rows) {
          here.template columns<R>(acc, rows, length, v.inner, ahead);
        });
      }
      store(with.out, walk.out + first * v.inner.out, acc, length, row ? 1 : v.inner.out, reduction, n, scale, &counts);
      if (task % n_blocks == n_blocks - 1) walk.next();
    }
    nonfinite += counts.nonfinite;
    saturated += counts.saturated;
  };
  const int64_t n_tasks = v.n_outer * n_blocks;
  if (n_tasks * work <= kGrain)
    do_tasks(0, n_tasks);
  else
    at::parallel_for(0, n_tasks, std::max<int64_t>(1, kGrain / std::max<int64_t>(work, 1)), do_tasks);
  return {nonfinite, saturated};
}

}  // namespace

Counts capture_cpu(const View& v, Reduction r, const Dtypes& dtypes, const Operands& with) {
  return with_dtype(dtypes.grad, [&](auto grad_type) {
    using G = typename decltype(grad_type)::type;
    using A = typename AccumulatorOf<G>::type;
    const StoreTask<A> store = with_dtype(
        dtypes.out, [](auto out_type) -> StoreTask<A> { return store_task<A, typename decltype(out_type)::type>; });
    return with_reduction(r, [&](auto reduction) {
      using R = typename decltype(reduction)::type;
      if (with.ref) return run<R>(v, r, Products<A>::template of<G>(with, dtypes.ref), with, store);
      return run<R>(v, r, Alone<G>{static_cast<const G*>(with.grad)}, with, store);
    });
  });
}

const char* cpu_features() { return isa_name(); }

}  // namespace tlfast
