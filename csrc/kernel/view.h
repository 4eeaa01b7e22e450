// A gradient, and what it is multiplied with, read as [outer, reduced, inner] with strides: the geometry of one call,
// made once; knows no torch.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "reduce.h"

namespace tlfast {

// One dimension; strides in elements. `out` is 0 where it is reduced, `mask` 0 where the mask doesn't depend on it, and
// `ref`, of the second operand, where there is none or it doesn't depend on it.
struct Dim {
  int64_t size, grad, out, mask, ref = 0;
};

// A few dimensions, in place: a call must not allocate.
class Dims {
 public:
  static constexpr int kMost = 16;  // dimensions that can't be joined; torch itself stops at 64

  void push_back(const Dim& d) {
    if (n_ == kMost) throw std::length_error("capture: grad must have at most 16 dimensions that can't be joined");
    dims_[n_++] = d;
  }
  void erase(int i) {
    for (--n_; i < n_; ++i) dims_[i] = dims_[i + 1];
  }
  TLFAST_INLINE int size() const { return n_; }
  TLFAST_INLINE const Dim& operator[](int i) const { return dims_[i]; }
  Dim& back() { return dims_[n_ - 1]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < n_; ++i) n *= dims_[i].size;
    return n;
  }

 private:
  Dim dims_[kMost];
  int n_ = 0;
};

struct View {
  Dims outer;             // kept dimensions but the inner one, slowest first
  Dims reduced;           // reduced dimensions but the inner one, in row-major order
  Dim inner{1, 1, 1, 0};  // the dimension that runs through the vector registers
  bool inner_reduced = false;
  int64_t n_outer = 1, n_reduced = 1;
};

namespace detail {

// Append a dimension; it joins the one before it where they lie behind each other in all tensors.
inline void append(Dims& dims, const Dim& d) {
  if (d.size == 1) return;
  if (dims.size() > 0) {
    Dim& o = dims.back();
    if (o.grad == d.grad * d.size && o.out == d.out * d.size && o.mask == d.mask * d.size && o.ref == d.ref * d.size) {
      o = {o.size * d.size, d.grad, d.out, d.mask, d.ref};
      return;
    }
  }
  dims.push_back(d);
}

// The last dimension along which the gradient is contiguous and the mask is constant, or -1.
inline int contiguous(const Dims& dims) {
  for (int i = dims.size() - 1; i >= 0; --i)
    if (dims[i].grad == 1 && dims[i].mask == 0) return i;
  return -1;
}

}  // namespace detail

// Collects the dimensions of a call in order, then makes its view.
class ViewBuilder {
 public:
  void keep(const Dim& d) { detail::append(view_.outer, d); }
  void reduce(const Dim& d) { detail::append(view_.reduced, d); }

  // `ordered`: the reduction looks at the order of elements (`last`), so the reduced dimensions stay whole.
  View build(bool ordered) {
    View& v = view_;
    int at = detail::contiguous(v.outer);
    const int run = ordered ? -1 : detail::contiguous(v.reduced);
    if (at < 0 && run >= 0) {
      v.inner = v.reduced[run];
      v.inner_reduced = true;
      v.reduced.erase(run);
    } else {
      if (at < 0 && v.outer.size() > 0 && v.outer.back().mask == 0) at = v.outer.size() - 1;
      if (at >= 0) {
        v.inner = v.outer[at];
        v.outer.erase(at);
      }
    }
    v.n_outer = v.outer.numel();
    v.n_reduced = v.reduced.numel();
    return v;
  }

 private:
  View view_;
};

// Positions by which the gradient is read: those of the slowest outer dimension, along which the view lets it stand
// still.
struct Gather {
  const int64_t* positions = nullptr;  // where the gradient is: each from 0 on
  int64_t n = 1, stride = 0;           // how many, and the gradient's stride between two positions
};

// The numbers of a call: where they lie, in which formats. All but `grad` and `out` may be null.
struct Dtypes {
  Dtype grad, out, ref;
};
struct Operands {
  const void *grad, *ref;  // ref: the second operand, of the gradient's sizes
  const void* mask;        // one byte an element
  void* out;
  double scale;
  Gather gather = {};

  // How far the gradient of an outer index lies from where the view has it.
  int64_t gathered(int64_t outer, int64_t n_outer) const {
    return gather.positions ? gather.positions[outer / (n_outer / gather.n)] * gather.stride : 0;
  }
};

// Elements from the start of the tensors.
struct Offsets {
  int64_t grad, out, mask, ref;
};

// Walks over all indices of some dimensions in row-major order, keeping the offsets into the tensors.
class Walk {
 public:
  explicit Walk(const Dims& dims) : dims_(dims) {}

  // Jump to the n-th index.
  void seek(int64_t n) {
    grad = out = mask = ref = 0;
    for (int d = dims_.size(); d-- > 0;) {
      index_[d] = n % dims_[d].size;
      n /= dims_[d].size;
      grad += index_[d] * dims_[d].grad;
      out += index_[d] * dims_[d].out;
      mask += index_[d] * dims_[d].mask;
      ref += index_[d] * dims_[d].ref;
    }
  }

  void next() {
    for (int d = dims_.size(); d-- > 0;) {
      grad += dims_[d].grad;
      out += dims_[d].out;
      mask += dims_[d].mask;
      ref += dims_[d].ref;
      if (++index_[d] < dims_[d].size) return;
      grad -= dims_[d].size * dims_[d].grad;
      out -= dims_[d].size * dims_[d].out;
      mask -= dims_[d].size * dims_[d].mask;
      ref -= dims_[d].size * dims_[d].ref;
      index_[d] = 0;
    }
  }

  int64_t grad = 0, out = 0, mask = 0, ref = 0;

 private:
  const Dims& dims_;
  int64_t index_[Dims::kMost] = {};
};

}  // namespace tlfast
