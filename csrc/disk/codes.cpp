// Rows to codes and back, block by block; the loops are compiled for each instruction set.
#include "codes.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "kernel/choose.h"
#include "kernel/isa.h"

namespace tlfast {
namespace {

constexpr float kSmallestScale = 0x1p-126f;  // the smallest normal float32
constexpr int64_t kPiece = 64;               // codes that are drawn, put in pairs, or taken apart at a time

// As an integer, which orders magnitudes as they are, NaN last: unlike that of floats, its maximum is vectorised.
TLFAST_INLINE int32_t magnitude(float x) { return int32_t(bits_of(x) & 0x7fffffffu); }
TLFAST_INLINE int16_t magnitude(bf16 x) { return int16_t(x.bits & 0x7fffu); }
TLFAST_INLINE int16_t magnitude(f16 x) { return int16_t(x.bits & 0x7fffu); }

template <class G>
TLFAST_INLINE float largest_of(const G* __restrict values, int64_t n) {
  decltype(magnitude(G())) largest = 0;
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude(values[i]));
  G stored;
  std::memcpy(&stored, &largest, sizeof(stored));
  return widen(stored);
}

// The whole number below, or the one above where what is between them is more than a number of [0, 1).
TLFAST_INLINE float one_of_two(float quotient, float uniform) {
  const float rounded = float_of(bits_of(quotient + 0x1.8p23f)) - 0x1.8p23f;
  const float below = rounded > quotient ? rounded - 1 : rounded;
  return quotient - below > uniform ? below + 1 : below;
}

// The nearest code of a quotient, half to even, as a byte; one of the two around it, drawn by a number of [0, 1); and
// what a byte stands for, which is exact.
struct Integer {
  static constexpr float kLargest = 127;
  // Numbers near 1.5 * 2^23 are integers: the sum rounds, and its last byte is the code in two's complement.
  static TLFAST_INLINE uint8_t nearest(float quotient) { return uint8_t(bits_of(quotient + 0x1.8p23f)); }
  static TLFAST_INLINE uint8_t drawn(float quotient, float uniform, float largest) {
    return nearest(std::max(-largest, std::min(one_of_two(quotient, uniform), largest)));
  }
  static TLFAST_INLINE float value(uint8_t code) { return float(int8_t(code)); }
};
struct Float8 {
  static constexpr float kLargest = 448;
  // Exponent bias 7 against 127, 3 fraction bits against 23. A quotient is below 449, so there is no overflow.
  static TLFAST_INLINE uint8_t nearest(float quotient) {
    const uint32_t u = bits_of(quotient), sign = (u >> 24) & 0x80u, size = u & 0x7fffffffu;
    const uint32_t rebiased = size - (120u << 23);
    const uint32_t normal = (rebiased + 0x7ffffu + ((rebiased >> 20) & 1u)) >> 20;
    // Below 2^-6 the codes are multiples of 2^-9, which is the last place of numbers near 2^14: the sum rounds.
    const uint32_t tiny = bits_of(float_of(size) + 0x1p14f) - bits_of(0x1p14f);
    return uint8_t(sign | (size < 0x3c800000u ? tiny : normal));
  }
  // Around a quotient codes are 2^-3 of its power of two apart, 2^-9 at least; so what is divided and multiplied by is
  // exact.
  static TLFAST_INLINE uint8_t drawn(float quotient, float uniform, float largest) {
    const uint32_t power = std::max(bits_of(quotient) & 0x7f800000u, 0x3c800000u);
    const float apart = float_of(power - (3u << 23));
    const float code = one_of_two(quotient / apart, uniform) * apart;
    return nearest(std::max(-largest, std::min(code, largest)));
  }
  static TLFAST_INLINE float value(uint8_t code) {
    const uint32_t sign = uint32_t(code & 0x80u) << 24, size = code & 0x7fu;
    const uint32_t tiny = bits_of(float(int32_t(size)) * 0x1p-9f);
    const uint32_t finite = size < 8 ? tiny : (size << 20) + (120u << 23);
    return float_of(sign | (size == 0x7fu ? 0x7fc00000u : finite));
  }
};

template <class Code, class G>
TLFAST_INLINE void to_bytes(const G* __restrict values, float scale, int64_t n, uint8_t* __restrict bytes) {
  for (int64_t i = 0; i < n; ++i) bytes[i] = Code::nearest(widen(values[i]) / scale);
}

template <class Code>
TLFAST_INLINE void from_bytes(const uint8_t* __restrict bytes, float scale, int64_t n, float* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] = Code::value(bytes[i]) * scale;
}

// The nearest codes of values of a row, `first` of which lie before them.
struct Nearest {
  template <class Code, class G>
  TLFAST_INLINE void bytes(const G* values, float scale, int64_t, int64_t n, uint8_t* to) const {
    to_bytes<Code>(values, scale, n, to);
  }
};

// Codes by random numbers: Philox4x32-10 (Salmon, Moraes, Dror and Shaw, 2011), 16 counters at a time in vectors.
struct Drawn {
  static constexpr int64_t kCounters = kPiece / 4;
  uint32_t key[2], position, number[2];
  float largest;

  TLFAST_INLINE void uniforms(int64_t first, float* __restrict to) const {
    uint32_t x[4][kCounters], k0 = key[0], k1 = key[1];
    for (int64_t j = 0; j < kCounters; ++j) {
      x[0][j] = uint32_t(first / 4 + j);
      x[1][j] = position, x[2][j] = number[0], x[3][j] = number[1];
    }
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      for (int64_t j = 0; j < kCounters; ++j) {
        const uint64_t a = uint64_t(x[0][j]) * 0xD2511F53u, b = uint64_t(x[2][j]) * 0xCD9E8D57u;
        x[0][j] = uint32_t(b >> 32) ^ x[1][j] ^ k0;
        x[2][j] = uint32_t(a >> 32) ^ x[3][j] ^ k1;
        x[1][j] = uint32_t(b), x[3][j] = uint32_t(a);
      }
    }
    for (int64_t j = 0; j < kCounters; ++j)
      for (int64_t word = 0; word < 4; ++word) to[4 * j + word] = float(int32_t(x[word][j] >> 8)) * 0x1p-24f;
  }

  // `first` is a multiple of 4.
  template <class Code, class G>
  TLFAST_INLINE void bytes(const G* __restrict values, float scale, int64_t first, int64_t n,
                           uint8_t* __restrict to) const {
    for (int64_t i = 0; i < n; i += kPiece) {
      float uniform[kPiece];
      uniforms(first + i, uniform);
      const int64_t here = std::min(kPiece, n - i);
      for (int64_t j = 0; j < here; ++j) to[i + j] = Code::drawn(widen(values[i + j]) / scale, uniform[j], largest);
    }
  }
};

// Where the codes of one block lie, a byte each.
template <class Code>
struct Bytes {
  static constexpr float kLargest = Code::kLargest;
  static TLFAST_INLINE int64_t size(int64_t n) { return n; }
  template <class How, class G>
  static TLFAST_INLINE void fill(const How& how, const G* values, float scale, int64_t first, int64_t n,
                                 uint8_t* codes) {
    how.template bytes<Code>(values, scale, first, n, codes);
  }
  static TLFAST_INLINE void read(const uint8_t* codes, float scale, int64_t n, float* values) {
    from_bytes<Code>(codes, scale, n, values);
  }
};

// Two integers in a byte; 0 beside a last one.
struct Pairs {
  static constexpr float kLargest = 7;
  static TLFAST_INLINE int64_t size(int64_t n) { return (n + 1) / 2; }
  template <class How, class G>
  static TLFAST_INLINE void fill(const How& how, const G* values, float scale, int64_t first, int64_t n,
                                 uint8_t* __restrict codes) {
    for (int64_t i = 0; i < n; i += kPiece, codes += kPiece / 2) {
      uint8_t bytes[kPiece] = {};
      const int64_t here = std::min(kPiece, n - i);
      how.template bytes<Integer>(values + i, scale, first + i, here, bytes);
      for (int64_t j = 0; j < (here + 1) / 2; ++j) codes[j] = uint8_t((bytes[2 * j] & 15) | bytes[2 * j + 1] << 4);
    }
  }
  static TLFAST_INLINE void read(const uint8_t* __restrict codes, float scale, int64_t n, float* values) {
    for (int64_t i = 0; i < n; i += kPiece, codes += kPiece / 2) {
      uint8_t bytes[kPiece];
      const int64_t here = std::min(kPiece, n - i);
      for (int64_t j = 0; j < (here + 1) / 2; ++j) {
        bytes[2 * j] = uint8_t(((codes[j] & 15) ^ 8) - 8);  // the sign of four bits
        bytes[2 * j + 1] = uint8_t(((codes[j] >> 4) ^ 8) - 8);
      }
      from_bytes<Integer>(bytes, scale, here, values + i);
    }
  }
};

template <class Codes, class G, bool kRandom>
struct Encode {
  static TLFAST_INLINE void run(const G* values, float per_code, int64_t n_rows, int64_t n_values, int64_t block,
                                uint8_t* codes, float* scales, const Rounding* rounding) {
    for (int64_t r = 0; r < n_rows; ++r) {
      std::conditional_t<kRandom, Drawn, Nearest> how;
      if constexpr (kRandom) {
        const auto example = uint64_t(rounding->examples[r]);
        how = {{rounding->key[0], rounding->key[1]},
               uint32_t(rounding->positions[r]),
               {uint32_t(example), uint32_t(example >> 32)},
               Codes::kLargest};
      }
      for (int64_t start = 0; start < n_values; start += block) {
        const int64_t n = std::min(block, n_values - start);
        const float largest = largest_of(values, n);
        if (is_finite(largest)) {
          *scales = std::max(largest * per_code, kSmallestScale);
          Codes::fill(how, values, *scales, start, n, codes);
        } else {
          *scales = std::numeric_limits<float>::quiet_NaN();
          std::memset(codes, 0, size_t(Codes::size(n)));
        }
        values += n, codes += Codes::size(n), ++scales;
      }
    }
  }
};

template <class Codes>
struct Decode {
  static TLFAST_INLINE void run(const uint8_t* codes, const float* scales, int64_t n_rows, int64_t n_values,
                                int64_t block, float* values) {
    for (int64_t r = 0; r < n_rows; ++r) {
      for (int64_t start = 0; start < n_values; start += block) {
        const int64_t n = std::min(block, n_values - start);
        Codes::read(codes, *scales, n, values);
        values += n, codes += Codes::size(n), ++scales;
      }
    }
  }
};

// Call `then` with the tag of how a kind of codes lies in memory.
template <class Then>
void with_codes(CodeKind kind, const Then& then) {
  switch (kind) {
    case CodeKind::int8:
      return then(Tag<Bytes<Integer>>());
    case CodeKind::float8:
      return then(Tag<Bytes<Float8>>());
    case CodeKind::int4:
      return then(Tag<Pairs>());
  }
  __builtin_unreachable();
}

template <class G>
void encode_as(const G* rows, float per_code, const CodedRows& to, const Rounding* rounding) {
  with_codes(to.kind, [&](auto codes) {
    using Codes = typename decltype(codes)::type;
    if (rounding)
      return For<Encode<Codes, G, true>>::here(rows, per_code, to.n_rows, to.n_values, to.block, to.codes, to.scales,
                                               rounding);
    For<Encode<Codes, G, false>>::here(rows, per_code, to.n_rows, to.n_values, to.block, to.codes, to.scales, rounding);
  });
}

}  // namespace

void encode_rows(const void* rows, Dtype dtype, float per_code, const CodedRows& coded, const Rounding* rounding) {
  if (dtype == Dtype::f32) encode_as(static_cast<const float*>(rows), per_code, coded, rounding);
  if (dtype == Dtype::bf16) encode_as(static_cast<const bf16*>(rows), per_code, coded, rounding);
  if (dtype == Dtype::f16) encode_as(static_cast<const f16*>(rows), per_code, coded, rounding);
}

void decoded_norms(const CodedRows& coded, const std::vector<int64_t>& lengths, float* norms) {
  std::vector<float> values;
  const uint8_t* codes = coded.codes;
  const float* scales = coded.scales;
  for (const int64_t n_rows : lengths) {
    values.resize(std::max(values.size(), size_t(n_rows * coded.n_values)));
    with_codes(coded.kind, [&](auto kind) {
      For<Decode<typename decltype(kind)::type>>::here(codes, scales, n_rows, coded.n_values, coded.block,
                                                       values.data());
    });
    uint8_t odd;
    const UnitRows together{values.data(), 1, n_rows * coded.n_values, Dtype::f32, norms++, &odd};
    row_norms(together, 0, 1);
    codes += n_rows * coded.row_bytes(), scales += n_rows * coded.n_blocks();
  }
}

}  // namespace tlfast
