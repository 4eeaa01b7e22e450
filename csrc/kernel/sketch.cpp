// Sketches of rows: each block of columns is changed in the L1 cache, and blocks are added up in a tree.
#include "sketch.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>
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

// Eight floats or four doubles, which one instruction takes on AVX2. GCC before 12 names the shuffle otherwise.
template <class A>
struct Lanes {
  static constexpr int64_t n = 32 / sizeof(A);
  typedef A Numbers __attribute__((vector_size(32)));
  typedef std::conditional_t<sizeof(A) == 4, int32_t, int64_t> Places __attribute__((vector_size(32)));

  static TLFAST_INLINE void load(Numbers& to, const A* from) { std::memcpy(&to, from, sizeof(to)); }
  static TLFAST_INLINE void store(A* to, const Numbers& from) { std::memcpy(to, &from, sizeof(from)); }

  // The sum and the difference of lanes that are `kApart` from each other, in their places.
  template <int64_t kApart, size_t... kLane>
  static TLFAST_INLINE void stage(Numbers& x, std::index_sequence<kLane...>) {
    const Numbers signs{(kLane & kApart ? A(-1) : A(1))...};
#if __has_builtin(__builtin_shufflevector)
    const Numbers others = __builtin_shufflevector(x, x, (kLane ^ kApart)...);
#else
    const Numbers others = __builtin_shuffle(x, Places{(kLane ^ kApart)...});
#endif
    x = others + x * signs;
  }
  template <int64_t kApart = n / 2>
  static TLFAST_INLINE void last_stages(Numbers& x) {
    if constexpr (kApart > 0) {
      stage<kApart>(x, std::make_index_sequence<size_t(n)>());
      last_stages<kApart / 2>(x);
    }
  }
};

// A Hadamard transform of n numbers, a power of two, in place: sums and differences of those that are n / 2 apart, then
// n / 4, and so on.
template <class A>
TLFAST_INLINE void transform(A* x, int64_t n) {
  using L = Lanes<A>;
  typename L::Numbers a, b, c, d;
  int64_t apart = n / 2;
  for (; apart >= 2 * L::n; apart /= 4) {  // two stages at once
    const int64_t half = apart / 2;
    for (A* block = x; block < x + n; block += 2 * apart)
      for (A* at = block; at < block + half; at += L::n) {
        L::load(a, at), L::load(b, at + half), L::load(c, at + apart), L::load(d, at + apart + half);
        const typename L::Numbers sum = a + c, difference = a - c, sum2 = b + d, difference2 = b - d;
        a = sum + sum2, b = sum - sum2, c = difference + difference2, d = difference - difference2;
        L::store(at, a), L::store(at + half, b), L::store(at + apart, c), L::store(at + apart + half, d);
      }
  }
  if (apart == L::n) {
    for (A* at = x; at < x + n; at += 2 * L::n) {
      L::load(c, at), L::load(d, at + L::n);
      a = c + d, b = c - d;
      L::last_stages(a), L::last_stages(b);
      L::store(at, a), L::store(at + L::n, b);
    }
  } else if (n >= L::n) {
    for (A* at = x; at < x + n; at += L::n) L::load(a, at), L::last_stages(a), L::store(at, a);
  } else {
    for (; apart > 0; apart /= 2)
      for (int64_t i = 0; i < n; ++i)
        if (!(i & apart)) {
          const A first = x[i], second = x[i + apart];
          x[i] = first + second, x[i + apart] = first - second;
        }
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

  TLFAST_INLINE const A* block(A* to, const G* __restrict x, int64_t q, int64_t n) const {
    const int64_t width = sketch.width;
    const A* const signs = static_cast<const A*>(sketch.input_signs) + q * width;
    for (int64_t i = 0; i < n; ++i) to[i] = A(widen(x[i])) * signs[i];
    for (int64_t i = n; i < width; ++i) to[i] = A(0);
    transform(to, width);
    const A* const output_signs = static_cast<const A*>(sketch.output_signs) + q * width;
    for (int64_t i = 0; i < width; ++i) to[i] *= output_signs[i];
    return to;
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
