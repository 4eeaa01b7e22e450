// From a number that is known at run time to a type: one switch for dtypes and one for reductions. None has a default,
// so that the compiler finds what was forgotten.
#pragma once

#include "reduce.h"

namespace tlfast {

// A type as a value: `typename decltype(tag)::type`.
template <class T>
struct Tag {
  using type = T;
};

// Call `then` with the tag of a dtype's type.
template <class Then>
inline auto with_dtype(Dtype dtype, const Then& then) {
  switch (dtype) {
    case Dtype::f32:
      return then(Tag<float>());
    case Dtype::bf16:
      return then(Tag<bf16>());
    case Dtype::f16:
      return then(Tag<f16>());
    case Dtype::f64:
      return then(Tag<double>());
  }
  __builtin_unreachable();
}

// Call `then` with the tag of what a reduction does to one element.
template <class Then>
inline auto with_reduction(Reduction reduction, const Then& then) {
  switch (reduction) {
    case Reduction::sum:
    case Reduction::mean:
      return then(Tag<Add>());
    case Reduction::norm:
      return then(Tag<AddSquare>());
    case Reduction::absmax:
      return then(Tag<MaxAbs>());
    case Reduction::none:
    case Reduction::last:
      return then(Tag<Keep>());
  }
  __builtin_unreachable();
}

}  // namespace tlfast
