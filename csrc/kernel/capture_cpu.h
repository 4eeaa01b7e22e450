// The CPU kernels: one pass over a gradient's bytes into the rows.
#pragma once

#include "reduce.h"
#include "view.h"

namespace tlfast {

// Reduce `grad` as `view` says and store it in `out`; `mask` (one byte an element) may be null. Deterministic for every
// number of threads: the order of additions depends on the shapes alone.
Counts capture_cpu(const View& view, Reduction reduction, Dtype grad_dtype, Dtype out_dtype, const void* grad,
                   void* out, const uint8_t* mask, double scale);

// The instruction set that the kernels use on this machine: "avx512", "avx2" or "baseline".
const char* cpu_features();

}  // namespace tlfast
