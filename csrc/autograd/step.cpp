// Steps: a backward commits its rows at all points together, or none.
#include "step.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cstddef>
#include <utility>

#include "device.h"
#include "kernel/errors.h"

namespace tlfast {
namespace {

namespace autograd = torch::autograd;

int64_t current_task() { return autograd::get_current_graph_task_id(); }

// The running graph task, or null. The engine tells the address of one of its members alone. But the type is in a
// public header, and this module runs beside no other minor version of torch than it was compiled for: so it is known
// how far that member is from the beginning.
const autograd::GraphTask* current() {
  const auto* const member = autograd::get_current_graph_task_exec_info();
  if (!member) return nullptr;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Winvalid-offsetof"  // without virtual bases all compilers know it
  constexpr size_t offset = offsetof(autograd::GraphTask, exec_info_);
#pragma GCC diagnostic pop
  const auto* const task = reinterpret_cast<const autograd::GraphTask*>(reinterpret_cast<const char*>(member) - offset);
  TORCH_INTERNAL_ASSERT(int64_t(task->id_) == current_task());
  return task;
}

// How many backwards run in this thread, one inside the other: on the CPU as in the thread of a device, the engine
// counts those that are called where one is running.
int n_backwards() {
  const auto* const task = current();
  return task ? task->reentrant_depth_ + 1 : 0;
}

// Whether all of the running graph task is done by the thread that called it, this one: it lets go of it last, then.
bool stays_here() {
  const auto* const nodes = autograd::get_current_graph_task_nodes_in_graph();
  return current()->reentrant_depth_ <= autograd::MAX_DEPTH &&  // deeper ones run in threads of a pool
         std::all_of(nodes->begin(), nodes->end(), [owner = current()->owner_](autograd::Node* node) {
           return node->device().is_cpu() || node->device().index() == owner;
         });
}

// Held by the engine's callback. If the engine drops it without a call, the backward failed.
struct End {
  std::shared_ptr<Step> step;
  int64_t task;
  bool nested, called = false;
  void call() {
    called = true;
    if (!nested) step->end(task);  // may raise; the end of a nested one commits nothing
  }
  ~End() { nested ? step->leave(task, called) : step->abort(task); }
};

}  // namespace

void Step::set_batch(std::optional<at::Tensor> mask, int64_t n_expected, double scale) {
  std::lock_guard<std::mutex> lock(mutex_);
  mask_.reset();
  if (mask) mask_.emplace(std::move(*mask), recording_);
  n_expected_ = n_expected;
  scale_ = scale;
}

void Step::look_around() {
  n_around_ = n_backwards();
  task_around_ = current_task();
  if (task_around_ == -1) return;
  struct Ended {
    std::weak_ptr<Step> step;
    ~Ended() {
      if (const auto here = step.lock()) here->look_around();
    }
  };
  std::shared_ptr<Ended> ended(new Ended{weak_from_this()});
  autograd::Engine::get_default_engine().queue_callback([ended] {});
}

bool Step::enter_forward() {
  const int64_t task = current_task();
  if (task == -1 || !active) return false;
  std::lock_guard<std::mutex> lock(mutex_);
  // One inside another that isn't known waits for its first gradient.
  if (!find(task) && !nested() && task != task_around_) open(task);
  return true;
}

bool Step::nested() const { return n_backwards() > n_around_ + 1; }

// The backward to which the running graph task belongs, or null if that isn't known yet.
std::shared_ptr<Backward> Step::find(int64_t task) {
  const auto here = std::this_thread::get_id();
  std::shared_ptr<Backward> run;
  if (const auto found = running_.find(task); found != running_.end()) {
    run = found->second;
    if (met_last_ != std::pair(here, run.get())) met_[here] = run;
  } else if (const auto around = met_.find(here); around != met_.end() && nested()) {
    run = around->second;
    follow(task, run);
  } else {
    return nullptr;
  }
  met_last_ = {here, run.get()};
  return run;
}

std::shared_ptr<Backward> Step::open(int64_t task) {
  auto run = std::make_shared<Backward>();
  run->root = task;
  run->fired.resize(points.size());
  run->pending.resize(points.size());
  run->mask = mask_;
  run->n_expected = n_expected_;
  run->scale = scale_;
  follow(task, run);
  met_[std::this_thread::get_id()] = run;
  return run;
}

// Count a graph task, the running one, as a part of a backward.
void Step::follow(int64_t task, const std::shared_ptr<Backward>& run) {
  running_[task] = run;
  std::shared_ptr<End> end(new End{shared_from_this(), task, nested()});
  autograd::Engine::get_default_engine().queue_callback([end] { end->call(); });
}

void Step::forget(const std::shared_ptr<Backward>& run) {
  std::erase_if(running_, [&](const auto& entry) { return entry.second == run; });
  std::erase_if(met_, [&](const auto& entry) { return entry.second == run; });
  met_last_ = {};
}

Step::Begun Step::begin(const Point& point, const at::Tensor& grad) {
  const int64_t task = current_task();
  TORCH_CHECK(task != -1,
              broken_rule(point.who, "a tap", "fire inside a backward", "a call outside one", "Call backward()."));
  std::lock_guard<std::mutex> lock(mutex_);
  auto run = find(task);
  if (!run) {
    TORCH_CHECK(!nested() || stays_here(),
                broken_rule(point.who, "a gradient", "be one of an outermost backward, or come after one of it",
                            "the first of a backward inside another one",
                            "Capture a point nearer to the loss, too, or leave this one out."));
    run = open(task);
  }
  const int n_fired = ++run->fired[point.index];
  TORCH_CHECK(n_fired == 1 || point.calls != Calls::raise,
              broken_rule(point.who, "a point", "fire once in a backward", "a second time",
                          "Choose calls=\"sum\", \"last\" or \"stack\"."));
  for (const auto& ring : point.rings) check_rows(point, *run, ring->n_rows(grad.sizes()));
  if (on_gpu(grad)) run->write_on(current_stream(grad.device()), n_fired > 1, failed_);
  return {run, run->block, n_fired};
}

void Step::check_rows(const Point& point, Backward& run, int64_t n) {
  TORCH_CHECK_VALUE(
      run.n_expected < 0 || n == run.n_expected,
      broken_rule(point.who, "a step", c10::str("have the ", run.n_expected, " rows that batch() announced"), n,
                  "Check mask and ids; a reduced batch makes one row."));
  if (!run.block) {
    const int64_t base = check_room(point.who, n);
    run.block = std::make_shared<Block>(Block{base, n, Block::State::open, {}});
    if (recording_) run.block->cursor = cursor_.mutable_data_ptr<int64_t>();
    blocks_.push_back(run.block);
  }
  TORCH_CHECK_VALUE(
      run.block->n == n,
      broken_rule(point.who, "a step", c10::str("have the same number of rows at every point (", run.block->n, ")"), n,
                  "Leave this point out, or capture it on its own."));
}

int64_t Step::check_room(const std::string& who, int64_t n) const {
  const int64_t base = next_base();
  TORCH_CHECK(base + n <= capacity_,
              broken_rule(who, "rows", c10::str("hold the ", base, " rows written and ", n, " more"), capacity_,
                          "Give capture more rows, or read them and call clear()."));
  return base;
}

void Step::end(int64_t task) {
  const at::NoGradGuard no_grad;
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = running_.find(task);
  if (found == running_.end() || !found->second->block || !active) return abort_locked(task);
  const auto run = found->second;
  for (const c10::Stream& caller : run->join_streams())
    for (const auto& point : points)
      for (const auto& ring : point->rings) ring->used_on(caller);
  if (run->spoilt) {
    abort_locked(task);
    TORCH_CHECK(false, broken_rule("capture", "a backward", "hold no other one that failed",
                                   "one whose error was caught after it had reached a point",
                                   "Let the error out, or run that one after this."));
  }
  Block& block = *run->block;
  std::vector<int64_t> missing;
  for (const auto& point : points)
    if (!run->fired[point->index]) missing.push_back(int64_t(point->index));
  if (!missing.empty() && !missing_is_nan) {
    const std::string text = no_gradient(*run, missing);
    abort_locked(task);
    TORCH_CHECK(false, text);
  }
  if (!missing.empty() && !block.cursor) come_after_failed();
  for (int64_t index : missing)
    for (const auto& ring : points[index]->rings) ring->fill_nan(block.place(), block.n);
  for (const auto& point : points)
    if (!run->pending[point->index].empty()) finish(*point, *run);
  block.missing = std::move(missing);
  if (block.cursor) launch_advance(cursor_, block.n);  // the last kernel of the step
  commit(block);
  forget(run);
}

void Step::commit(Block& block) {
  block.state = Block::State::committed;
  n_rows_ += block.n;
  ++n_ended;
  calls_before_ = n_calls;
  failed_.clear();
}

// The error for points without a gradient: which were not called, and which were to no effect.
std::string Step::no_gradient(const Backward& run, const std::vector<int64_t>& missing) const {
  const auto seen = [&](const Point& point) { return point.last_call > calls_before_; };
  // Where all are made in compiled code none is counted, and with several forwards in flight they may have been before
  // the last step.
  bool counted = true;
  for (const auto& point : points) counted &= !run.fired[point->index] || seen(*point);
  std::string idle, called, other;
  for (const int64_t index : missing) {
    const Point& point = *points[size_t(index)];
    std::string& names = counted && !seen(point) ? idle : called;
    names += (names.empty() ? "" : ", ") + point.name;
    if (&names == &called && other.empty() && !point.others.empty())
      other = "Choose " + point.others + " at " + point.name + ", or leave";
  }
  std::string got = idle.empty() ? "" : "no call of " + idle + " since the last step (none is seen in compiled code)";
  if (!called.empty()) {
    got += (idle.empty() ? "no gradient at " : "; no gradient at ") + called;
    if (counted) got += " (called, but the backward does not go through the output)";
  }
  return broken_rule("capture", "every point", "fire in a backward", got,
                     (other.empty() ? "Leave" : other) + " these points out, or pass missing=\"nan\" for NaN rows.");
}

void Step::note_others(Point& point, std::string others) {
  std::lock_guard<std::mutex> lock(mutex_);
  point.others = std::move(others);
}

// Write what had to wait for the end of the step: the sum of several calls, or their stack.
void Step::finish(const Point& point, Backward& run) {
  auto& held = run.pending[point.index];
  for (const auto& tensors : held)
    for (const auto& tensor : tensors)  // the backward's nodes may have run on another stream
      if (on_gpu(tensor)) read_on(current_stream(tensor.device()), tensor);
  for (size_t number = 0; number < point.rings.size(); ++number) {
    Ring& ring = *point.rings[number];
    if (point.calls == Calls::stack) {
      // The last call of the forward fires first: turned around, index k is call k.
      std::vector<at::Tensor> parts;
      for (auto it = held.rbegin(); it != held.rend(); ++it) parts.push_back((*it)[number]);
      ring.put_stack(run.block->place(), parts);
    } else {
      ring.write(run.block->place(), held[0][0], run.mask_on(held[0][0].device()), run.scale);
    }
  }
}

void Step::abort(int64_t task) {
  std::lock_guard<std::mutex> lock(mutex_);
  abort_locked(task);
}

void Step::abort_locked(int64_t task) {
  const auto found = running_.find(task);
  if (found == running_.end()) return;
  const auto run = found->second;
  calls_before_ = n_calls;
  run->give_up(failed_);
  forget(run);
  if (run->block && run->block->state == Block::State::open) {
    run->block->state = Block::State::aborted;
    while (!blocks_.empty() && blocks_.back()->state == Block::State::aborted) blocks_.pop_back();
  }
}

void Step::leave(int64_t task, bool ended_well) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = running_.find(task);
  if (found == running_.end()) return;
  const auto run = found->second;
  if (run->root != task) {
    run->spoilt |= !ended_well;  // its gradients lie among the others
    running_.erase(found);
    return;
  }
  const int64_t around = current_task();
  if (!ended_well || around == -1 || !active) return abort_locked(task);
  if (const auto other = running_.find(around); other != running_.end()) {
    other->second->spoilt = true;  // two blocks for one backward: begun in a device's thread meanwhile
    return abort_locked(task);
  }
  running_.erase(found);
  run->root = around;
  follow(around, run);
}

std::pair<int64_t, int64_t> Step::extent() const {
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block)
    if ((*block)->state == Block::State::committed) return {n_rows_, (*block)->base + (*block)->n};
  return {n_rows_, 0};
}

std::vector<std::tuple<int64_t, int64_t, std::vector<int64_t>>> Step::committed() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<std::tuple<int64_t, int64_t, std::vector<int64_t>>> out;
  for (const auto& block : blocks_)
    if (block->state == Block::State::committed) out.emplace_back(block->base, block->n, block->missing);
  return out;
}

// Let the current streams of the devices that hold rows wait for what failed backwards have begun to write.
void Step::come_after_failed() const {
  if (failed_.empty()) return;
  for (const auto& point : points)
    for (const auto& ring : point->rings)
      if (const at::Tensor rows = ring->rows(); rows.defined() && on_gpu(rows))
        for (const Done& done : failed_) wait_for(done, current_stream(rows.device()));
}

void Step::settle() const {
  std::lock_guard<std::mutex> lock(mutex_);
  come_after_failed();
}

void Step::check_at_rest(const char* who) const {
  for (const auto& [task, run] : running_)
    TORCH_CHECK(!run->block, broken_rule(who, "the capture", "be at rest", "a running backward",
                                         "Call it after backward() returned."));
}

void Step::clear() {
  std::lock_guard<std::mutex> lock(mutex_);
  check_at_rest("clear");
  blocks_.clear();
  n_rows_ = 0;
  for (const auto& point : points)
    for (const auto& ring : point->rings) ring->clear();
}

void Step::start_trial() {
  std::lock_guard<std::mutex> lock(mutex_);
  check_at_rest("graph_step");
  before_ = blocks_;
  n_rows_before_ = n_rows_;
  for (const auto& point : points)
    for (const auto& ring : point->rings) ring->save_counts();
}

void Step::stop_trial() {
  std::lock_guard<std::mutex> lock(mutex_);
  blocks_ = std::move(before_);
  n_rows_ = n_rows_before_;
  before_.clear();
  for (const auto& point : points)
    for (const auto& ring : point->rings) ring->restore_counts();
}

void Step::start_recording(const at::Device& device) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_at_rest("graph_step");
  TORCH_CHECK(!recording_, broken_rule("graph_step", "the capture", "record one step at a time", "a second one",
                                       "Finish the first."));
  for (const auto& point : points)
    for (const auto& ring : point->rings) ring->check_recorded_on(device);
  if (!cursor_.defined()) {
    cursor_ = at::zeros({1}, at::TensorOptions().device(device).dtype(at::kLong));
    TORCH_CHECK(on_gpu(cursor_),
                broken_rule("graph_step", "the device", "be one of CUDA", device, "Run the step itself."));
    launch_advance(cursor_, 0);  // the first launch loads the kernel, which is no work for a recording
  }
  before_.swap(blocks_);  // the recorded rows lie from the cursor on: their base is 0
  n_rows_before_ = std::exchange(n_rows_, 0);
  recording_ = true;
}

Recording Step::stop_recording() {
  std::lock_guard<std::mutex> lock(mutex_);
  TORCH_CHECK(recording_, broken_rule("graph_step", "a recording", "have been started", "none", "Start one."));
  blocks_.swap(before_);
  n_rows_ = n_rows_before_;
  const auto recorded = std::move(before_);
  before_.clear();
  recording_ = false;
  Recording out;
  for (const auto& point : points)
    for (const auto& ring : point->rings) out.writes.push_back({ring, ring->take_recorded(), ring->rows()});
  TORCH_CHECK(recorded.size() == 1 && recorded[0]->state == Block::State::committed,
              broken_rule("graph_step", "step", "run one backward that reaches the points", c10::str(recorded.size()),
                          "Call backward() once in it."));
  out.n_rows = recorded[0]->n;
  out.missing = recorded[0]->missing;
  return out;
}

void Step::replay(const Recording& recording) {
  std::lock_guard<std::mutex> lock(mutex_);
  check_at_rest("graph_step");
  for (const auto& write : recording.writes)
    TORCH_CHECK(write.ring->rows().is_same(write.rows),
                broken_rule("graph_step", "a recorded step", "find the rows where they were when it was recorded",
                            "others at " + write.ring->column, "Record it again: after clear() their shape changed."));
  const int64_t base = check_room("capture", recording.n_rows);
  come_after_failed();
  if (cursor_stands_ != base) launch_set_cursor(cursor_, base);
  cursor_stands_ = base + recording.n_rows;
  blocks_.push_back(std::make_shared<Block>(Block{base, recording.n_rows, Block::State::open, recording.missing}));
  for (const auto& write : recording.writes) write.ring->replayed(write.n);
  commit(*blocks_.back());
}

void Step::take_back(const Recording& recording) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!blocks_.empty()) {
    n_rows_ -= blocks_.back()->n;
    blocks_.pop_back();
  }
  for (const auto& write : recording.writes) write.ring->replayed(-write.n);
  --n_ended;
  cursor_stands_ = -1;
}

}  // namespace tlfast
