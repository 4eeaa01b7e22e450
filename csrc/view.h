// A gradient read as [outer, reduced, inner] with strides: the geometry of one call, made once; knows no torch.
#pragma once

#include <cstdint>
#include <vector>

namespace tlfast {

// One dimension; strides in elements. `out` is 0 where it is reduced, `mask` 0 where the mask doesn't depend on it.
struct Dim {
  int64_t size, grad, out, mask;
};

struct View {
  std::vector<Dim> outer;    // kept dimensions but the inner one, slowest first
  std::vector<Dim> reduced;  // reduced dimensions but the inner one, in row-major order
  Dim inner{1, 1, 1, 0};     // the dimension that runs through the vector registers
  bool inner_reduced = false;
  int64_t n_outer = 1, n_reduced = 1;

  bool empty() const { return n_outer * inner.size == 0 && !inner_reduced; }
};

namespace detail {

// Join neighbours that lie behind each other in all three tensors; drop dimensions of size 1.
inline std::vector<Dim> joined(const std::vector<Dim>& dims) {
  std::vector<Dim> out;
  for (const Dim& d : dims) {
    if (d.size == 1) continue;
    if (!out.empty()) {
      Dim& o = out.back();
      if (o.grad == d.grad * d.size && o.out == d.out * d.size && o.mask == d.mask * d.size) {
        o = {o.size * d.size, d.grad, d.out, d.mask};
        continue;
      }
    }
    out.push_back(d);
  }
  return out;
}

inline int64_t product(const std::vector<Dim>& dims) {
  int64_t n = 1;
  for (const Dim& d : dims) n *= d.size;
  return n;
}

// The last dimension along which the gradient is contiguous, or -1.
inline int contiguous(const std::vector<Dim>& dims) {
  for (int i = int(dims.size()) - 1; i >= 0; --i)
    if (dims[i].grad == 1 && dims[i].mask == 0) return i;
  return -1;
}

}  // namespace detail

// `ordered`: the reduction looks at the order of elements (`last`), so the reduced dimensions stay whole.
inline View make_view(const std::vector<Dim>& kept, const std::vector<Dim>& reduced, bool ordered) {
  View v;
  v.outer = detail::joined(kept);
  v.reduced = detail::joined(reduced);
  int at = detail::contiguous(v.outer);
  const int run = ordered ? -1 : detail::contiguous(v.reduced);
  if (at < 0 && run >= 0) {
    v.inner = v.reduced[run];
    v.inner_reduced = true;
    v.reduced.erase(v.reduced.begin() + run);
  } else {
    if (at < 0 && !v.outer.empty() && v.outer.back().mask == 0) at = int(v.outer.size()) - 1;
    if (at >= 0) {
      v.inner = v.outer[at];
      v.outer.erase(v.outer.begin() + at);
    }
  }
  v.n_outer = detail::product(v.outer);
  v.n_reduced = detail::product(v.reduced);
  return v;
}

// Walks over all indices of some dimensions in row-major order, keeping the offsets into the three tensors.
class Walk {
 public:
  explicit Walk(const std::vector<Dim>& dims) : dims_(dims), index_(dims.size(), 0) {}

  // Jump to the n-th index.
  void seek(int64_t n) {
    grad = out = mask = 0;
    for (size_t d = dims_.size(); d-- > 0;) {
      index_[d] = n % dims_[d].size;
      n /= dims_[d].size;
      grad += index_[d] * dims_[d].grad;
      out += index_[d] * dims_[d].out;
      mask += index_[d] * dims_[d].mask;
    }
  }

  void next() {
    for (size_t d = dims_.size(); d-- > 0;) {
      grad += dims_[d].grad;
      out += dims_[d].out;
      mask += dims_[d].mask;
      if (++index_[d] < dims_[d].size) return;
      grad -= dims_[d].size * dims_[d].grad;
      out -= dims_[d].size * dims_[d].out;
      mask -= dims_[d].size * dims_[d].mask;
      index_[d] = 0;
    }
  }

  int64_t grad = 0, out = 0, mask = 0;

 private:
  const std::vector<Dim>& dims_;
  std::vector<int64_t> index_;
};

}  // namespace tlfast
