// Reductions (start, step, combine, finish) and number formats, shared by the CPU and the CUDA kernels; knows no torch.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define TLFAST_INLINE __host__ __device__ __forceinline__
#else
#define TLFAST_INLINE inline __attribute__((always_inline))
#endif

namespace tlfast {

enum class Reduction : int { none, sum, mean, last, norm, absmax };
inline constexpr std::array<const char*, 6> kReductionNames{"none", "sum", "mean", "last", "norm", "absmax"};
enum class Dtype : int { f32, bf16, f16, f64 };

// Whether there are kernels that reduce so the product with a second operand. Of squares and maxima of products there
// are none: they would double the kernels, and what keeps each product (`none`) gives them, too.
inline bool reduces_products(Reduction reduction) {
  switch (reduction) {
    case Reduction::none:
    case Reduction::sum:
    case Reduction::mean:
    case Reduction::last:
      return true;
    case Reduction::norm:
    case Reduction::absmax:
      break;
  }
  return false;
}

// How many stored values are infinite or NaN, and how many of them only through the cast.
struct Counts {
  int64_t nonfinite = 0, saturated = 0;
};

// A stored bfloat16 or float16: 16 bits of memory, no arithmetic.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// The type in which a gradient of type G is accumulated.
template <class G>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};

TLFAST_INLINE uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof(u));
  return u;
}
TLFAST_INLINE float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof(x));
  return x;
}

// Widening is exact.
TLFAST_INLINE float widen(float x) { return x; }
TLFAST_INLINE double widen(double x) { return x; }
TLFAST_INLINE float widen(bf16 x) { return float_of(uint32_t(x.bits) << 16); }
TLFAST_INLINE float widen(f16 x) {
#if defined(__CUDA_ARCH__)
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(x.bits));
  return wide;
#else
  // IEEE 754 binary16: exponent bias 15 against 127, 10 fraction bits against 23. No branches: this runs in vectors.
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;             // infinity and NaN
  const uint32_t tiny = bits_of(float(int32_t(magnitude)) * 0x1p-24f);  // subnormal: a count of 2^-24
  const uint32_t finite = magnitude < 0x400u ? tiny : normal;
  return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
#endif
}

// Narrowing rounds to nearest, ties to even; NaN stays NaN, what is too large becomes infinity.
template <class O>
struct Narrow;
template <>
struct Narrow<float> {
  static TLFAST_INLINE float of(double x) { return float(x); }
};
template <>
struct Narrow<double> {
  static TLFAST_INLINE double of(double x) { return x; }
};
// float64 as float32, rounded to odd: rounding that to 16 bits gives what one rounding would have given.
// Source: Boldo and Melquiond, "When double rounding is odd" (2005).
TLFAST_INLINE float to_odd(double x) {
  const float narrow = float(x);
  const double back = double(narrow);
  const uint32_t toward_zero = bits_of(narrow) - uint32_t((back < 0 ? -back : back) > (x < 0 ? -x : x));
  return (back == x) | (x != x) ? narrow : float_of(toward_zero | 1u);
}

template <>
struct Narrow<bf16> {
  static TLFAST_INLINE bf16 of(double x) { return of(to_odd(x)); }
  static TLFAST_INLINE bf16 of(float x) {
    const uint32_t u = bits_of(x);
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    return {uint16_t((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
  }
};
template <>
struct Narrow<f16> {
  static TLFAST_INLINE f16 of(double x) { return of(to_odd(x)); }
  static TLFAST_INLINE f16 of(float x) {
    const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7fffffffu;
    const uint32_t rebiased = magnitude - (112u << 23);
    uint32_t normal = (rebiased + 0xfffu + ((rebiased >> 13) & 1u)) >> 13;
    normal = normal > 0x7c00u ? 0x7c00u : normal;
    // Below 2^-14 the results are multiples of 2^-24, which is the last place of numbers near 0.5: the sum rounds.
    const uint32_t tiny = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
    const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
    return {uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite))};
  }
};

TLFAST_INLINE bool is_finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }
TLFAST_INLINE bool is_finite(double x) { return x - x == 0; }

// What happens to one element: `step` takes it in, `combine` joins two partial results. All start from 0.
struct Add {
  template <class A>
  static TLFAST_INLINE A step(A acc, A x) {
    return acc + x;
  }
  template <class A>
  static TLFAST_INLINE A combine(A a, A b) {
    return a + b;
  }
};
struct AddSquare {
  template <class A>
  static TLFAST_INLINE A step(A acc, A x) {
    return acc + x * x;
  }
  template <class A>
  static TLFAST_INLINE A combine(A a, A b) {
    return a + b;
  }
};
struct MaxAbs {
  template <class A>
  static TLFAST_INLINE A step(A acc, A x) {
    const A a = x < 0 ? -x : x;
    return (a > acc) | (a != a) ? a : acc;  // a NaN gets in, and stays: nothing is larger than it
  }
  template <class A>
  static TLFAST_INLINE A combine(A a, A b) {
    return step(a, b);
  }
};
struct Keep {
  template <class A>
  static TLFAST_INLINE A step(A, A x) {
    return x;
  }
  template <class A>
  static TLFAST_INLINE A combine(A, A b) {
    return b;
  }
};

// From the accumulated value over n elements to the result.
template <class A>
TLFAST_INLINE A finish(Reduction reduction, A acc, int64_t n) {
  switch (reduction) {
    case Reduction::mean:
      return acc / A(n);  // NaN over nothing
    case Reduction::norm:
      return std::sqrt(acc);
    case Reduction::last:
      return n == 0 ? A(float_of(0x7fc00000u)) : acc;  // NaN over nothing
    case Reduction::none:
    case Reduction::sum:
    case Reduction::absmax:
      break;
  }
  return acc;
}

}  // namespace tlfast
