// The L2 norms of rows: 32 float64 lanes, then a tree; the loops are compiled for each instruction set.
#include "row_norms.h"

#include <limits>

#include "kernel/choose.h"
#include "kernel/isa.h"

namespace tlfast {
namespace {

// Four lanes: the compiler keeps eight of these in registers, which it does not do with an array of 32.
typedef double Four __attribute__((vector_size(32)));
constexpr int kFours = kNormLanes / 4;

template <class G>
TLFAST_INLINE void add_squares(Four* lanes, const G* __restrict values) {
  double wide[kNormLanes];
  for (int64_t j = 0; j < kNormLanes; ++j) wide[j] = double(widen(values[j]));
  for (int k = 0; k < kFours; ++k) {
    Four four;
    std::memcpy(&four, wide + 4 * k, sizeof(four));
    lanes[k] += four * four;
  }
}

// sums[r] = the sum of the squares of row r.
template <class G>
struct SquareSums {
  static TLFAST_INLINE void run(const G* __restrict row, int64_t n_rows, int64_t n_values, double* __restrict sums) {
    for (int64_t r = 0; r < n_rows; ++r, row += n_values) {
      Four lanes[kFours];
      for (int k = 0; k < kFours; ++k) lanes[k] = Four{};
      int64_t i = 0;
      for (; i + kNormLanes <= n_values; i += kNormLanes) add_squares(lanes, row + i);
      if (i < n_values) {  // zeros change no sum
        G rest[kNormLanes] = {};
        std::memcpy(rest, row + i, (n_values - i) * sizeof(G));
        add_squares(lanes, rest);
      }
      for (int half = kFours / 2; half; half /= 2)
        for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
      sums[r] = (lanes[0][0] + lanes[0][2]) + (lanes[0][1] + lanes[0][3]);
    }
  }
};

template <class G>
bool has_odd(const G* row, int64_t n_values) {
  for (int64_t i = 0; i < n_values; ++i)
    if (!std::isfinite(double(widen(row[i])))) return true;
  return false;
}

constexpr int64_t kAtOnce = 64;  // rows between two looks at their sums

template <class G>
void norms_of(const UnitRows& rows, int64_t first, int64_t last) {
  const G* data = static_cast<const G*>(rows.data);
  double sums[kAtOnce];
  for (int64_t base = first; base < last; base += kAtOnce) {
    const int64_t n = base + kAtOnce < last ? kAtOnce : last - base;
    For<SquareSums<G>>::here(data + base * rows.n_values, n, rows.n_values, sums);
    for (int64_t r = 0; r < n; ++r) {
      // A NaN has one form in the row tables, whatever the CPU made of it. The square of a float64 can overflow.
      const bool odd = !std::isfinite(sums[r]) && has_odd(data + (base + r) * rows.n_values, rows.n_values);
      rows.odd[base + r] = odd;
      rows.norms[base + r] = std::isnan(sums[r]) ? std::numeric_limits<float>::quiet_NaN() : float(std::sqrt(sums[r]));
    }
  }
}

}  // namespace

void row_norms(const UnitRows& rows, int64_t first, int64_t last) {
  if (!rows.dtype) return;
  with_dtype(*rows.dtype, [&](auto stored) { norms_of<typename decltype(stored)::type>(rows, first, last); });
}

}  // namespace tlfast
