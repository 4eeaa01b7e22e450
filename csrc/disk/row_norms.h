// The L2 norms of rows, in one order of addition that the Python code shares; knows no torch.
#pragma once

#include <optional>

#include "kernel/reduce.h"

namespace tlfast {

// The square of value i is added to lane i % kNormLanes, by rising i; then lane j gets lane j + 16, j + 8, ... j + 1.
// All in float64. tlfast/dataset/format/norms.py does the same to the bit, so this is a part of the format:
// docs/format.md.
constexpr int64_t kNormLanes = 32;

// Rows of one field, one after the other in memory; what is found goes to `norms` and `odd`, one of each per row.
struct UnitRows {
  const void* data;
  int64_t n_rows, n_values;
  std::optional<Dtype> dtype;  // none: codes of a byte, which have no norms
  float* norms;
  uint8_t* odd;  // 1 where a value of the row is NaN or infinite

  int64_t row_bytes() const { return n_values * (!dtype ? 1 : dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2); }
};

// The norms of rows first <= r < last; nothing of codes.
void row_norms(const UnitRows& rows, int64_t first, int64_t last);

}  // namespace tlfast
