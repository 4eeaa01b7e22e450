// A column: what one spec keeps at one point. A recipe, its rows, and what to do about several calls.
#pragma once

#include <memory>
#include <mutex>

#include "recipe.h"
#include "rows.h"
#include "step_input.h"

namespace tlfast {

// What to do where a point is called, and so fires, several times in one backward.
enum class Calls { raise, sum, last, stack };
Calls parse_calls(const std::string& name);

// What a column is given of a step.
struct Step {
  const std::optional<at::Tensor>& mask;  // of the step
  double scale;
  const OwnInputs& own;
};

class Column {
 public:
  Column(std::string name, Reduction reduction, std::vector<int64_t> dims, std::optional<at::ScalarType> dtype,
         int64_t capacity, Calls calls, Of of, Form form = {}, std::shared_ptr<const Weight> weight = nullptr);

  // An error unless what was seen makes rows that fit those that are there.
  void check(const Place& place, const Seen& seen, const Step& step);

  // Reduce, cast and copy what was seen into the rows from `place` on.
  void write(const Place& place, const Seen& seen, const Step& step);

  // The same into rows of its own, for one of several calls. Those that are to be added up are not rounded, nor
  // counted.
  at::Tensor part(const Place& place, const Seen& seen, const Step& step);

  // Write the parts of several calls; they become the first dimension of a row.
  void put_stack(const Place& place, const std::vector<at::Tensor>& parts);

  // Write the sum of the parts of several calls.
  void put_sum(const Place& place, const at::Tensor& sum);

  // What all recorded writes since the last call use: it must live as long as what was recorded.
  std::vector<at::Tensor> take_recorded_scratch();

  // An error where the rows lie on another device than the cursor of a recording.
  void check_recorded_on(const at::Device& device) const;

  const std::string name, who;
  const Calls calls;
  std::shared_ptr<Column> total;  // to which its rows are added, with those of other points: it has none of its own
  bool masked = true;             // false: the gradients have no positions, and a step's mask is not about them
  std::optional<StepInput> ref;   // what the gradients of all steps are multiplied with
  const Recipe recipe;
  Rows rows;

 private:
  // What was learnt from a gradient of this geometry. A training loop has the same one at every step, buckets of
  // lengths have a few in turn.
  struct Known {
    bool fits(const Read& read, const std::optional<c10::Stream>& stream) const;

    int64_t generation;  // of the rows, whose address is among what was learnt
    std::vector<int64_t> sizes, strides, ref_strides, mask_sizes, mask_strides;
    at::ScalarType dtype, ref_dtype;
    bool one;
    at::Device device;
    Plan plan;
    at::Tensor memory;  // all rows
    char* rows;
    int64_t row_bytes;
    // Of rows on a GPU:
    std::optional<c10::Stream> stream;
    int64_t row_elements;
    at::Tensor scratch;
  };

  at::Tensor fitting(const Read& read);
  void count_plan(const Place& place, const Plan& plan, const at::Tensor& out, const Read& read, double scale);
  Read read(const Place& place, const Seen& seen, const Step& step) const;
  void hold_recorded(const Place& place, const Read& read, const at::Tensor& scratch);
  std::shared_ptr<const Known> recall(const Read& read, const std::optional<c10::Stream>& stream) const;
  std::shared_ptr<const Known> learn(const Read& read, const Place& place, const std::optional<c10::Stream>& stream);
  void launch(const Known& known, const Place& place, const Read& read, const Operands& with, int64_t* counters);

  mutable std::mutex mutex_;
  std::mutex launching_;  // held over the launches of a reduction that is split
  static constexpr size_t kGeometries = 8;
  std::vector<std::shared_ptr<const Known>> known_;  // at most that many: a new one takes the place of the oldest
  size_t oldest_known_ = 0;
  std::vector<at::Tensor> recorded_;  // what the recording that is made uses
};

}  // namespace tlfast
