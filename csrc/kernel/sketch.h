// Sketches of rows: a few additions for each number, in an order that depends on the columns alone.
#pragma once

#include "reduce.h"

namespace tlfast {

// One side of one module, as tlfast/projections/sketches.py makes it. Signs are in the accumulator's type.
struct Sketch {
  int64_t columns, width, n_parts, dim;
  double scale;
  const void* input_signs;   // [n_parts, columns]
  const int64_t* shifts;     // [n_parts, n_blocks] of a count sketch; null: a Hadamard sketch, of one part
  const void* output_signs;  // [n_blocks, width] of a Hadamard sketch
  const int64_t* samples;    // [dim] of a Hadamard sketch

  int64_t n_blocks() const { return (columns + width - 1) / width; }
};

// out [n_rows, dim] of x [n_rows, columns], both of `dtype`; `stride` is from row to row of x. The same bits as
// tlfast/projections/applying.py, for every number of rows and of threads.
void sketch_rows(const Sketch& sketch, Dtype dtype, const void* x, int64_t stride, int64_t n_rows, void* out);

}  // namespace tlfast
