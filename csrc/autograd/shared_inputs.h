// Projections of one input for several modules that read it, made by one product.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Stream.h>

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "weight.h"

namespace tlfast {

// Which weights read one tensor is seen as their modules run. From then on the first of them that runs makes the
// product for all. Where it is seen first, the product is made anew, also what was made of it before: so no number
// depends on what ran earlier.
class SharedInputs {
 public:
  using Reader = std::shared_ptr<const Weight>;

  // What `weight->keep(who, input)` gives. `n_ended`: of the steps; what is left of an earlier one isn't taken.
  at::Tensor keep(const std::string& who, const Reader& weight, const at::Tensor& input, int64_t n_ended);

  // A step of this thread is over, or has failed: let go what was kept to be taken. It is returned, to be freed where
  // no lock is held: hooks on saved tensors may have given its memory a Python object, which is freed with the GIL.
  [[nodiscard]] std::shared_ptr<void> forget();

 private:
  // One tensor as it was at one moment: not another one at its address, by a weak reference, and unchanged, by its
  // version.
  struct Seen {
    Seen(const at::Tensor& input, int64_t n_ended);
    bool is(const at::Tensor& input, int64_t n_ended) const;

    c10::weak_intrusive_ptr<at::TensorImpl> tensor;
    const void* memory;
    std::vector<int64_t> sizes, strides;
    uint32_t version;
    std::optional<c10::Stream> stream;
    int64_t n_ended;
  };
  struct Part {
    Reader reader;
    at::Tensor made;
    bool taken;
  };
  struct Last {  // what a thread saw last; no other one touches it
    Seen seen;
    std::vector<Part> parts;
  };
  struct Group {
    std::vector<Reader> readers;
    // Their right matrices side by side, [I, sum of p], where and on which stream they were made.
    std::vector<std::pair<at::Tensor, std::optional<c10::Stream>>> matrices;
  };

  void make(const Reader& weight, const at::Tensor& input, Last& last);
  std::shared_ptr<Group> group_with(const std::vector<Part>& before, const Reader& weight);
  at::Tensor matrix_of(Group& group, const at::Tensor& input);

  std::mutex mutex_;
  std::vector<std::shared_ptr<Group>> groups_;
  std::vector<at::Tensor> used_;  // matrices on a GPU: a step that was recorded reads them where they are
  std::vector<std::pair<std::thread::id, std::shared_ptr<Last>>> last_;
};

}  // namespace tlfast
