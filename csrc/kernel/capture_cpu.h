// The CPU kernels: one pass over a gradient's bytes into the rows.
#pragma once

#include "reduce.h"
#include "view.h"

namespace tlfast {

// Reduce the gradient, or its product with the second operand where there is one, as `view` says, and store it in
// `out`. Deterministic for every number of threads: the order of additions depends on the shapes alone.
Counts capture_cpu(const View& view, Reduction reduction, const Dtypes& dtypes, const Operands& with);

// The instruction set that the kernels use on this machine: "avx512", "avx2" or "baseline".
const char* cpu_features();

}  // namespace tlfast
