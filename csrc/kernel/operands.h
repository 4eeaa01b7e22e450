// What a task of the CPU kernels takes in, its load policy: the gradient by itself, or its product with another tensor.
#pragma once

#include <algorithm>

#include "choose.h"
#include "isa.h"
#include "loops.h"
#include "view.h"

namespace tlfast {

// A few reduced rows, by the elements from where a task begins to each of them.
struct RowOffsets {
  static constexpr int64_t kMost = 256;
  int64_t n = 0;
  int64_t grad[kMost], ref[kMost];  // ref: where there is a second operand
};

// The gradient by itself, which is reduced where it lies.
template <class G>
struct Alone {
  using A = typename AccumulatorOf<G>::type;
  static constexpr bool kPair = false;
  const G* grad;

  int64_t element_bytes() const { return sizeof(G); }
  Alone from(int64_t of_grad, int64_t) const { return {grad + of_grad}; }

  // Take `length` elements along the inner dimension of each row into as many accumulators.
  template <class R>
  void columns(A* acc, const RowOffsets& rows, int64_t length, const Dim& inner, bool ahead) const {
    if (inner.grad == 1)
      For<Columns<G, R, true>>::here(acc, grad, rows.grad, rows.n, length, inner.grad, ahead);
    else
      For<Columns<G, R, false>>::here(acc, grad, rows.grad, rows.n, length, inner.grad, false);
  }

  // Reduce each row, whole, to a result of its own.
  static bool takes_short(const Dim& inner) { return inner.grad == 1; }
  template <class R>
  void short_rows(A* results, const RowOffsets& rows, const Dim& inner) const {
    For<ShortRows<G, R>>::here(results, grad, rows.grad, rows.n, inner.size);
  }

  // Take each row, whole, into kLanes accumulators.
  template <class R>
  void lanes(A* acc, const RowOffsets& rows, const Dim& inner) const {
    if (inner.grad == 1)
      For<Lanes<G, R, true>>::here(acc, grad, rows.grad, rows.n, inner.size, inner.grad);
    else  // no faster in any other instruction set: each element is a line of the cache
      For<Lanes<G, R, false>>::baseline(acc, grad, rows.grad, rows.n, inner.size, inner.grad);
  }
};

// Whether each of n rows begins where the one before ends.
inline bool adjacent(const int64_t* rows, int64_t n, int64_t length) {
  for (int64_t k = 1; k < n; ++k)
    if (rows[k] != rows[k - 1] + length) return false;
  return true;
}

template <class A>
using MultiplyRows = void (*)(A* products, const void* grad, const void* ref, const int64_t* grad_rows,
                              const int64_t* ref_rows, int64_t n, int64_t length, const Dim& inner, bool ahead);

template <class G, class F>
void multiply_rows(typename AccumulatorOf<G>::type* products, const void* grad, const void* ref,
                   const int64_t* grad_rows, const int64_t* ref_rows, int64_t n, int64_t length, const Dim& inner,
                   bool ahead) {
  const auto* const g = static_cast<const G*>(grad);
  const auto* const f = static_cast<const F*>(ref);
  if (inner.grad == 1 && inner.ref == 1)
    For<Multiply<G, F, true>>::here(products, g, f, grad_rows, ref_rows, n, length, inner.grad, inner.ref, ahead);
  else
    For<Multiply<G, F, false>>::here(products, g, f, grad_rows, ref_rows, n, length, inner.grad, inner.ref, false);
}

// The products with a second operand: a few at a time, made in the L1 cache and reduced there as a gradient of the
// accumulator's type would be. So there is one loop for two dtypes, and none for two dtypes and a reduction.
template <class Accumulator>
struct Products {
  using A = Accumulator;
  static constexpr bool kPair = true;
  static constexpr int64_t kHeld = 2048;   // products at a time: 8 KiB in float32
  static constexpr int64_t kTogether = 4;  // rows that share one trip of the accumulators
  static_assert(kHeld % kLanes == 0);      // a row may be cut there: each of its elements stays in its lane
  const char *grad, *ref;
  int64_t grad_bytes, ref_bytes;  // of an element
  MultiplyRows<A> multiply;

  template <class G>
  static Products of(const Operands& with, Dtype ref_dtype) {
    return with_dtype(ref_dtype, [&](auto ref_type) {
      using F = typename decltype(ref_type)::type;
      return Products{static_cast<const char*>(with.grad), static_cast<const char*>(with.ref), sizeof(G), sizeof(F),
                      multiply_rows<G, F>};
    });
  }

  int64_t element_bytes() const { return grad_bytes + ref_bytes; }
  Products from(int64_t of_grad, int64_t of_ref) const {
    return {grad + of_grad * grad_bytes, ref + of_ref * ref_bytes, grad_bytes, ref_bytes, multiply};
  }

  template <class R>
  void columns(A* acc, const RowOffsets& rows, int64_t length, const Dim& inner, bool ahead) const {
    alignas(64) A held[kHeld];
    for (int64_t k = 0; k < rows.n; k += kTogether) {
      const int64_t n = std::min(kTogether, rows.n - k);
      const bool more = ahead && k + 2 * kTogether <= rows.n;
      for (int64_t first = 0; first < length; first += kHeld / kTogether) {
        const int64_t here = std::min(kHeld / kTogether, length - first);
        const int64_t at[kTogether] = {0, here, 2 * here, 3 * here};
        const Products part = from(first * inner.grad, first * inner.ref);
        multiply(held, part.grad, part.ref, rows.grad + k, rows.ref + k, n, here, inner, more);
        For<Columns<A, R, true>>::here(acc + first, static_cast<const A*>(held), at, n, here, int64_t(1), false);
      }
    }
  }

  static bool takes_short(const Dim& inner) { return inner.size <= kHeld; }
  template <class R>
  void short_rows(A* results, const RowOffsets& rows, const Dim& inner) const {
    alignas(64) A held[kHeld];
    const int64_t together = std::min(kHeld / std::max<int64_t>(inner.size, 1), RowOffsets::kMost);
    int64_t at[RowOffsets::kMost];
    for (int64_t r = 0; r < std::min(together, rows.n); ++r) at[r] = r * inner.size;
    for (int64_t k = 0; k < rows.n; k += together) {
      const int64_t n = std::min(together, rows.n - k);
      // Rows that lie behind each other in both are one long row to the loop.
      const bool one = inner.grad == 1 && inner.ref == 1 && adjacent(rows.grad + k, n, inner.size) &&
                       adjacent(rows.ref + k, n, inner.size);
      multiply(held, grad, ref, rows.grad + k, rows.ref + k, one ? 1 : n, one ? n * inner.size : inner.size, inner,
               false);
      For<ShortRows<A, R>>::here(results + k, static_cast<const A*>(held), static_cast<const int64_t*>(at), n,
                                 inner.size);
    }
  }

  template <class R>
  void lanes(A* acc, const RowOffsets& rows, const Dim& inner) const {
    alignas(64) A held[kHeld];
    const int64_t piece = std::min(inner.size, kHeld);
    const int64_t together = piece < inner.size ? 1 : std::min(kHeld / std::max<int64_t>(piece, 1), rows.n);
    int64_t at[RowOffsets::kMost];
    for (int64_t r = 0; r < together; ++r) at[r] = r * piece;
    for (int64_t k = 0; k < rows.n; k += together) {
      const int64_t n = std::min(together, rows.n - k);
      for (int64_t first = 0; first < inner.size; first += piece) {
        const int64_t here = std::min(piece, inner.size - first);
        const Products part = from(first * inner.grad, first * inner.ref);
        multiply(held, part.grad, part.ref, rows.grad + k, rows.ref + k, n, here, inner, false);
        For<Lanes<A, R, true>>::here(acc, static_cast<const A*>(held), static_cast<const int64_t*>(at), n, here,
                                     int64_t(1));
      }
    }
  }
};

}  // namespace tlfast
