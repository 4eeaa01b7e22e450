// Who else holds a tensor that a module put out, as reference counts tell it.
#pragma once

#include <torch/csrc/autograd/python_variable.h>

#include <atomic>
#include <memory>

#include "autograd/plain.h"

namespace tlfast {

// How often an output, its memory and its node are referenced.
struct References {
  Py_ssize_t object = 0;
  size_t tensor = 0, storage = 0, node = 0;

  static References of(PyObject* object, const at::Tensor& tensor) {
    const auto& node = tensor.grad_fn();
    const size_t storage = is_plain(tensor) && tensor.has_storage() ? tensor.storage().use_count() : ~size_t(0);
    return {Py_REFCNT(object), size_t(tensor.use_count()), storage, node ? size_t(node.use_count()) : 0};
  }
  bool within(const References& most) const {
    return object <= most.object && tensor <= most.tensor && storage <= most.storage && node <= most.node;
  }
};

// The counts of a plain output that nobody holds but the running frames. They depend on the versions of Python and
// torch, and on where they are looked at. So they are learnt there, from a module made for it; what is learnt first
// stays.
class Unshared {
 public:
  void learn(const References& seen) {
    const References* none = nullptr;
    auto learnt = std::make_unique<const References>(seen);
    if (most_.compare_exchange_strong(none, learnt.get())) learnt.release();
  }
  const References* most() const { return most_.load(); }

 private:
  std::atomic<const References*> most_{nullptr};  // set once, and null until then
};

}  // namespace tlfast
