// Sketches of rows: each block of columns is changed in the L1 cache, and blocks are added up in a tree.
#include "sketch.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "choose.h"
#include "isa.h"

namespace tlfast {
namespace {

constexpr int64_t kWorthAThread = 32768;  // numbers, as at::internal::GRAIN_SIZE

template <class A>
TLFAST_INLINE void add(A* __restrict to, const A* __restrict a, const A* __restrict b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = a[i] + b[i];
}

template <class A>
TLFAST_INLINE void add_to(A* __restrict to, const A* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += from[i];
}

// Two stages of a Hadamard transform: each takes the sums and differences of the halves, side by side.
template <class A>
TLFAST_INLINE void two_stages(A* __restrict to, const A* __restrict from, int64_t n) {
  const int64_t quarter = n / 4;
  const A* __restrict a = from, * __restrict b = from + quarter, * __restrict c = from + 2 * quarter, * __restrict d = from + 3 * quarter;
  for (int64_t i = 0; i < quarter; ++i) {
    const A sum = a[i] + c[i], difference = a[i] - c[i], sum2 = b[i] + d[i], difference2 = b[i] - d[i];
    to[4 * i] = sum + sum2;
    to[4 * i + 1] = sum - sum2;
    to[4 * i + 2] = difference + difference2;
    to[4 * i + 3] = difference - difference2;
  }
}

template <class A>
TLFAST_INLINE void one_stage(A* __restrict to, const A* __restrict from, int64_t n) {
  const int64_t half = n / 2;
  const A* __restrict a = from, * __restrict b = from + half;
  for (int64_t i = 0; i < half; ++i) {
    to[2 * i] = a[i] + b[i];
    to[2 * i + 1] = a[i] - b[i];
  }
}

// What a count sketch does to a block: place j goes to (j + shift) % width.
template <class A, class G>
struct Turned {
  static constexpr bool kSampled = false;
  const Sketch& sketch;
  int64_t part;

  // The block is laid down twice in a row, so that the turned one is a piece of that.
  TLFAST_INLINE const A* block(A* __restrict twice, const G* __restrict x, int64_t q, int64_t n) const {
    const int64_t width = sketch.width;
    const A* const signs = static_cast<const A*>(sketch.input_signs) + part * sketch.columns + q * width;
    for (int64_t i = 0; i < n; ++i) twice[i] = twice[i + width] = A(widen(x[i])) * signs[i];
    for (int64_t i = n; i < width; ++i) twice[i] = twice[i + width] = A(0);
    return twice + width - sketch.shifts[part * sketch.n_blocks() + q];
  }
};

// What a Hadamard sketch does to a block.
template <class A, class G>
struct Transformed {
  static constexpr bool kSampled = true;
  const Sketch& sketch;
  int64_t part;

  TLFAST_INLINE const A* block(A* from, const G* __restrict x, int64_t q, int64_t n) const {
    const int64_t width = sketch.width;
    const A* const signs = static_cast<const A*>(sketch.input_signs) + q * width;
    A* next = from + width;
    for (int64_t i = 0; i < n; ++i) from[i] = A(widen(x[i])) * signs[i];
    for (int64_t i = n; i < width; ++i) from[i] = A(0);
    int64_t left = std::countr_zero(uint64_t(width));
    for (; left >= 2; left -= 2, std::swap(from, next)) two_stages(next, from, width);
    if (left) one_stage(next, from, width), std::swap(from, next);
    const A* const output_signs = static_cast<const A*>(sketch.output_signs) + q * width;
    for (int64_t i = 0; i < width; ++i) from[i] *= output_signs[i];
    return from;
  }
};

// One part of one row. `memory`: two blocks of scratch for each of two neighbours, then the sums that wait for theirs.
template <class Block, class A, class G>
struct Part {
  static TLFAST_INLINE void run(const Sketch& sketch, int64_t part, const G* x, A* memory, G* out) {
    const Block made{sketch, part};
    const int64_t width = sketch.width, n_blocks = sketch.n_blocks();
    A *const sums = memory + 4 * width, *top = sums;  // the end of the sums
    for (int64_t q = 0; q < n_blocks; q += 2, top += width) {
      const int64_t start = q * width, left = sketch.columns - start;
      const A* const first = made.block(memory, x + start, q, std::min(width, left));
      if (q + 1 == n_blocks) {
        std::copy(first, first + width, top);
        continue;
      }
      const int64_t n = std::min(width, left - width);
      add(top, first, made.block(memory + 2 * width, x + start + width, q + 1, n), width);
      for (int64_t pairs = q >> 1; pairs & 1; pairs >>= 1, top -= width) add_to(top - width, top, width);
    }
    if (top == sums) std::fill(sums, top += width, A(0));  // of no columns
    for (; top - sums > width; top -= width) add_to(top - 2 * width, top - width, width);
    const A scale = A(sketch.scale);
    if (Block::kSampled && sketch.dim != width)
      for (int64_t r = 0; r < sketch.dim; ++r) out[r] = Narrow<G>::of(sums[sketch.samples[r]] * scale);
    else
      for (int64_t r = 0; r < width; ++r) out[part * width + r] = Narrow<G>::of(sums[r] * scale);
  }
};

template <template <class, class> class Block, class G>
void all_rows(const Sketch& sketch, const G* x, int64_t stride, int64_t n_rows, G* out) {
  using A = typename AccumulatorOf<G>::type;
  const int64_t levels = std::bit_width(uint64_t(sketch.n_blocks())) + 1;
  const int64_t grain = std::max<int64_t>(1, kWorthAThread / std::max<int64_t>(1, sketch.columns));
  at::parallel_for(0, n_rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<A> memory(size_t((4 + levels) * sketch.width));
    for (int64_t row = begin; row < end; ++row)
      for (int64_t part = 0; part < sketch.n_parts; ++part)
        For<Part<Block<A, G>, A, G>>::template here<const Sketch&>(sketch, part, x + row * stride, memory.data(),
                                                                   out + row * sketch.dim);
  });
}

}  // namespace

void sketch_rows(const Sketch& sketch, Dtype dtype, const void* x, int64_t stride, int64_t n_rows, void* out) {
  with_dtype(dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    const auto* const from = static_cast<const G*>(x);
    auto* const to = static_cast<G*>(out);
    if (sketch.shifts)
      all_rows<Turned>(sketch, from, stride, n_rows, to);
    else
      all_rows<Transformed>(sketch, from, stride, n_rows, to);
  });
}

}  // namespace tlfast
