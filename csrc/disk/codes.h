// Rows as codes of 8 or 4 bits with scales, and the norms of what they stand for; knows no torch.
#pragma once

#include <vector>

#include "row_norms.h"

namespace tlfast {

// What a code is: an int8, a float8_e4m3fn, or one of two int4 in a byte, the first in the low bits.
enum class CodeKind { int8, float8, int4 };

// Codes and scales of rows, one row after the other. tlfast/dataset/format/encodings.py makes the same to the bit, so
// this is a part of the format: docs/format.md.
struct CodedRows {
  CodeKind kind;
  int64_t n_rows, n_values;
  int64_t block;  // values of a row that share a scale; the last block may be shorter. Even for int4, unless it is all
  uint8_t* codes;
  float* scales;

  int64_t n_blocks() const { return (n_values + block - 1) / block; }
  int64_t row_bytes() const { return kind == CodeKind::int4 ? (n_values + 1) / 2 : n_values; }
};

// By which random numbers rows are rounded: of each row its example and its place among the example's.
struct Rounding {
  uint32_t key[2];
  const int64_t *examples, *positions;
};

// Fill codes and scales from rows of float32, bfloat16 or float16; a scale is the largest magnitude times `per_code`.
// Codes are the nearest, or, with a rounding, one of the two around a value.
void encode_rows(const void* rows, Dtype dtype, float per_code, const CodedRows& coded,
                 const Rounding* rounding = nullptr);

// norms[i] = that of the decoded rows of example i together, which has lengths[i] of them; 0 where it has none.
void decoded_norms(const CodedRows& coded, const std::vector<int64_t>& lengths, float* norms);

}  // namespace tlfast
