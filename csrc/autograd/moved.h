// Matrices where they are used: the same one for each call on a device and in a dtype.
#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>
#include <vector>

namespace tlfast {

class Moved {
 public:
  // A matrix, which its owner keeps, where a tensor is, and in its dtype.
  at::Tensor like(const at::Tensor& matrix, const at::Tensor& tensor) const {
    return found(matrix, tensor.options(), false);
  }

  // The same, turned: products are faster with its columns side by side.
  at::Tensor turned(const at::Tensor& matrix, const at::TensorOptions& there) const {
    return found(matrix, there, true);
  }

 private:
  at::Tensor found(const at::Tensor& matrix, const at::TensorOptions& options, bool turned) const {
    std::lock_guard<std::mutex> lock(mutex_);
    for (const auto& [of, is_turned, moved] : moved_)
      if (of == matrix.unsafeGetTensorImpl() && is_turned == turned && moved.device() == options.device() &&
          moved.scalar_type() == options.dtype())
        return moved;
    // Turned before it is moved: a copy from the host is there when it returns, and whichever stream comes next finds
    // it.
    const at::Tensor cast = matrix.to(c10::typeMetaToScalarType(options.dtype()));
    const at::Tensor made = (turned ? cast.transpose(-2, -1) : cast).contiguous();
    moved_.push_back({matrix.unsafeGetTensorImpl(), turned, made.to(options.device())});
    return moved_.back().matrix;
  }

  struct Entry {
    const at::TensorImpl* of;
    bool turned;
    at::Tensor matrix;
  };
  mutable std::mutex mutex_;
  mutable std::vector<Entry> moved_;
};

}  // namespace tlfast
