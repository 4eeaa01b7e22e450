// The inner loops of the CPU kernels, written so that GCC and Clang vectorise them.
#pragma once

#include "reduce.h"

namespace tlfast {

constexpr int64_t kLanes = 64;      // partial results of a reduced inner dimension: four AVX-512 registers
constexpr int64_t kCacheLine = 64;  // bytes
constexpr int64_t kAhead = 32;      // elements between two fetches; GCC unrolls shorter loops before it vectorises them

template <class A>
struct Start {
  static TLFAST_INLINE void run(A* acc, int64_t length) {
    for (int64_t i = 0; i < length; ++i) acc[i] = 0;
  }
};

template <class R, class A>
TLFAST_INLINE A four(A acc, A a, A b, A c, A d) {
  return R::step(R::step(R::step(R::step(acc, a), b), c), d);
}

// acc[i] = step(acc[i], grad[offset + i * stride]) for each offset in order; four rows share one trip of the
// accumulator.
template <class G, class R, bool kUnit>
struct Columns {
  using A = typename AccumulatorOf<G>::type;
  static TLFAST_INLINE void run(A* __restrict acc, const G* __restrict grad, const int64_t* offsets, int64_t n,
                                int64_t length, int64_t stride_, bool ahead) {
    const int64_t stride = kUnit ? 1 : stride_;
    int64_t k = 0;
    for (; k + 4 <= n; k += 4) {
      const G* __restrict a = grad + offsets[k], * __restrict b = grad + offsets[k + 1];
      const G* __restrict c = grad + offsets[k + 2], * __restrict d = grad + offsets[k + 3];
      int64_t i = 0;
      if (kUnit && ahead && k + 8 <= n) {
        for (; i + kAhead <= length; i += kAhead) {
          for (int64_t r = 4; r < 8; ++r)
            for (int64_t j = 0; j < kAhead; j += kCacheLine / sizeof(G))
              __builtin_prefetch(grad + offsets[k + r] + i + j, 0, 2);
          for (int64_t j = i; j < i + kAhead; ++j)
            acc[j] = four<R>(acc[j], A(widen(a[j])), A(widen(b[j])), A(widen(c[j])), A(widen(d[j])));
        }
      }
      for (; i < length; ++i) {
        const int64_t at = i * stride;
        acc[i] = four<R>(acc[i], A(widen(a[at])), A(widen(b[at])), A(widen(c[at])), A(widen(d[at])));
      }
    }
    for (; k < n; ++k) {
      const G* __restrict a = grad + offsets[k];
      for (int64_t i = 0; i < length; ++i) acc[i] = R::step(acc[i], A(widen(a[i * stride])));
    }
  }
};

// Combine 2 * kHalf lanes, always in this order, into the first.
template <class R, int64_t kHalf>
struct Fold {
  template <class A>
  static TLFAST_INLINE void run(A* acc) {
    for (int64_t j = 0; j < kHalf; ++j) acc[j] = R::combine(acc[j], acc[j + kHalf]);
    if constexpr (kHalf > 1) Fold<R, kHalf / 2>::run(acc);
  }
};

// The same where the inner dimension is reduced: element i of a row goes to lane i % kLanes.
template <class G, class R, bool kUnit>
struct Lanes {
  using A = typename AccumulatorOf<G>::type;
  static TLFAST_INLINE void run(A* __restrict lanes, const G* __restrict grad, const int64_t* offsets, int64_t n,
                                int64_t length, int64_t stride_) {
    const int64_t stride = kUnit ? 1 : stride_;
    A acc[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) acc[j] = lanes[j];
    for (int64_t k = 0; k < n; ++k) {
      const G* __restrict row = grad + offsets[k];
      int64_t i = 0;
      for (; i + kLanes <= length; i += kLanes)
        for (int64_t j = 0; j < kLanes; ++j) acc[j] = R::step(acc[j], A(widen(row[(i + j) * stride])));
      for (int64_t j = 0; i + j < length; ++j) acc[j] = R::step(acc[j], A(widen(row[(i + j) * stride])));
    }
    for (int64_t j = 0; j < kLanes; ++j) lanes[j] = acc[j];
  }
};

// results[r] = the row at offsets[r], reduced as by Lanes and then by Fold: for many short rows, each of which is one
// result. The last lanes are folded of many rows in turn, whose sums don't wait for each other.
template <class G, class R>
struct ShortRows {
  using A = typename AccumulatorOf<G>::type;
  static constexpr int64_t kTogether = 32, kLeft = 8;  // rows, and lanes of each that are left then

  template <int64_t kHalf>
  static TLFAST_INLINE void halve(A* acc) {
    for (int64_t j = 0; j < kHalf; ++j) acc[j] = R::combine(acc[j], acc[j + kHalf]);
    if constexpr (kHalf > kLeft) halve<kHalf / 2>(acc);
  }

  static TLFAST_INLINE void run(A* __restrict results, const G* __restrict grad, const int64_t* offsets, int64_t n,
                                int64_t length) {
    const int64_t whole = length / kLanes * kLanes;
    const A zero = A(length < 0);  // no constant: GCC would fill with `rep stos`, which takes longer than a row
    alignas(64) A left[kTogether * kLeft];
    for (int64_t first = 0; first < n; first += kTogether) {
      const int64_t here = n - first < kTogether ? n - first : kTogether;
      for (int64_t r = 0; r < here; ++r) {
        const G* __restrict row = grad + offsets[first + r];
        alignas(64) A acc[kLanes];
        if (whole)
          for (int64_t j = 0; j < kLanes; ++j) acc[j] = R::step(A(0), A(widen(row[j])));
        else
          for (int64_t j = 0; j < kLanes; ++j) acc[j] = zero;
        for (int64_t i = kLanes; i < whole; i += kLanes)
          for (int64_t j = 0; j < kLanes; ++j) acc[j] = R::step(acc[j], A(widen(row[i + j])));
        for (int64_t j = 0; whole + j < length; ++j) acc[j] = R::step(acc[j], A(widen(row[whole + j])));
        halve<kLanes / 2>(acc);
        for (int64_t j = 0; j < kLeft; ++j) left[r * kLeft + j] = acc[j];
      }
      for (int64_t r = 0; r < here; ++r) {  // as Fold halves 8 lanes, to 4, 2 and 1
        const A* const a = left + r * kLeft;
        const A even = R::combine(R::combine(a[0], a[4]), R::combine(a[2], a[6]));
        const A odd = R::combine(R::combine(a[1], a[5]), R::combine(a[3], a[7]));
        results[first + r] = R::combine(even, odd);
      }
    }
  }
};

// products[r * length + i] = grad[grad_rows[r] + i * grad_stride] * ref[ref_rows[r] + i * ref_stride] for n rows, each
// factor widened or rounded to the accumulator's type first. `ahead`: four more rows follow, and are fetched.
template <class G, class F, bool kUnit>
struct Multiply {
  using A = typename AccumulatorOf<G>::type;
  static TLFAST_INLINE void run(A* __restrict products, const G* __restrict grad, const F* __restrict ref,
                                const int64_t* grad_rows, const int64_t* ref_rows, int64_t n, int64_t length,
                                int64_t grad_stride_, int64_t ref_stride_, bool ahead) {
    const int64_t grad_stride = kUnit ? 1 : grad_stride_, ref_stride = kUnit ? 1 : ref_stride_;
    for (int64_t r = 0; r < n; ++r) {
      const G* __restrict g = grad + grad_rows[r];
      const F* __restrict f = ref + ref_rows[r];
      A* __restrict to = products + r * length;
      int64_t i = 0;
      if (kUnit && ahead) {
        const G* next_g = grad + grad_rows[r + 4];
        const F* next_f = ref + ref_rows[r + 4];
        for (; i + kAhead <= length; i += kAhead) {
          for (int64_t j = 0; j < kAhead; j += kCacheLine / sizeof(G)) __builtin_prefetch(next_g + i + j, 0, 2);
          for (int64_t j = 0; j < kAhead; j += kCacheLine / sizeof(F)) __builtin_prefetch(next_f + i + j, 0, 2);
          for (int64_t j = i; j < i + kAhead; ++j) to[j] = A(widen(g[j])) * A(widen(f[j]));
        }
      }
      for (; i < length; ++i) to[i] = A(widen(g[i * grad_stride])) * A(widen(f[i * ref_stride]));
    }
  }
};

// What a stored value is in memory: for the 16-bit types their bits, since GCC doesn't vectorise stores of structs.
TLFAST_INLINE float raw(float x) { return x; }
TLFAST_INLINE double raw(double x) { return x; }
TLFAST_INLINE uint16_t raw(bf16 x) { return x.bits; }
TLFAST_INLINE uint16_t raw(f16 x) { return x.bits; }

template <class A, class O, bool kUnit>
struct Store {
  static TLFAST_INLINE void run(O* out_, const A* __restrict acc, int64_t length, int64_t stride_, Reduction reduction,
                                int64_t n, A scale, Counts* counts) {
    const int64_t stride = kUnit ? 1 : stride_;
    auto* __restrict out = reinterpret_cast<decltype(raw(O()))*>(out_);
    const auto loop = [&](auto result) __attribute__((always_inline)) {
      uint32_t any = 0;
      for (int64_t i = 0; i < length; ++i) {
        const O stored = Narrow<O>::of(result(acc[i]) * scale);
        out[i * stride] = raw(stored);
        any |= uint32_t(!is_finite(widen(stored)));
      }
      if (!any) return;
      for (int64_t i = 0; i < length; ++i) {
        const bool bad = !is_finite(widen(out_[i * stride]));
        counts->nonfinite += bad;
        counts->saturated += bad && is_finite(result(acc[i]) * scale);
      }
    };
    if (reduction == Reduction::mean)
      loop([n](A x) __attribute__((always_inline)) { return finish(Reduction::mean, x, n); });
    else if (reduction == Reduction::norm)
      loop([n](A x) __attribute__((always_inline)) { return finish(Reduction::norm, x, n); });
    else if (n == 0)
      loop([reduction](A x) __attribute__((always_inline)) { return finish(reduction, x, 0); });
    else
      loop([](A x) __attribute__((always_inline)) { return x; });
  }
};

}  // namespace tlfast
