// Keepers: what a tap gives the outputs and gradients of its point to.
#pragma once

#include <functional>

#include "backwards.h"
#include "tensor_cache.h"

namespace tlfast {

struct Call;

class Keeper {
 public:
  virtual ~Keeper() = default;

  // What was seen of one call: plain memory, without a history.
  virtual void gradient(const Call& call, const Seen& seen) = 0;

  // What a call put out, as an alias without a history; undefined stands for what is no tensor.
  virtual void output(const at::Tensor&) {}

  // The columns that make rows of a gradient; an empty one makes no backward a step.
  virtual std::vector<std::shared_ptr<Column>> columns() const { return {}; }

  // Whether each call is to keep its output for its backward.
  virtual bool reads_outputs() const { return false; }

  // What each call is to keep of its input, and whether it is to keep something. `sharing`: the capture's backwards
  // where what several modules read may be projected for all of them at once.
  virtual std::vector<at::Tensor> keep_of_input(const std::string&, const at::Tensor&, Backwards* /*sharing*/) const {
    return {};
  }
  virtual bool reads_inputs() const { return false; }

  // Whether outputs are kept, and a call without a gradient passes zeros on, as a full backward hook does.
  virtual bool keeps_outputs() const { return false; }
};

// Columns of rows.
class ColumnsKeeper : public Keeper {
 public:
  explicit ColumnsKeeper(std::vector<std::shared_ptr<Column>> columns);
  void gradient(const Call& call, const Seen& seen) override;
  std::vector<std::shared_ptr<Column>> columns() const override { return columns_; }
  bool reads_outputs() const override { return reads_outputs_; }
  std::vector<at::Tensor> keep_of_input(const std::string& who, const at::Tensor& input,
                                        Backwards* sharing) const override;
  bool reads_inputs() const override { return reads_inputs_; }

 private:
  const std::vector<std::shared_ptr<Column>> columns_;
  const bool sums_;  // whether one of them adds up what it sees of several calls
  const bool reads_outputs_, reads_inputs_;
};

// A cache of whole tensors; several calls are summed, or the last to fire is kept.
class CacheKeeper : public Keeper {
 public:
  CacheKeeper(std::shared_ptr<TensorCache> cache, const std::string& name, Change select, Calls calls)
      : cache_(std::move(cache)), place_(cache_->add(name, std::move(select))), calls_(calls) {}
  void gradient(const Call& call, const Seen& seen) override;
  void output(const at::Tensor& kept) override { cache_->output(place_, kept); }
  bool keeps_outputs() const override { return true; }

 private:
  const std::shared_ptr<TensorCache> cache_;
  const size_t place_;
  const Calls calls_;
};

// Whatever takes a gradient.
using Sink = std::function<void(const at::Tensor&)>;

class SinkKeeper : public Keeper {
 public:
  explicit SinkKeeper(Sink takes) : takes_(std::move(takes)) {}
  void gradient(const Call&, const Seen& seen) override { takes_(seen.grad); }

 private:
  const Sink takes_;
};

}  // namespace tlfast
