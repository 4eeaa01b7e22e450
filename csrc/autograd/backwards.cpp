// Which backward is running, and what it makes at its end.
#include "backwards.h"

#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>
#include <cstddef>
#include <utility>

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
  std::shared_ptr<Backwards> backwards;
  int64_t task;
  bool nested, called = false;
  void call() {
    called = true;
    if (!nested) backwards->end(task);  // may raise; the end of a nested one commits nothing
  }
  ~End() { nested ? backwards->leave(task, called) : backwards->abort(task); }
};

// Write what had to wait for the end of the step: the sum of several calls, or their stack.
void finish(const Point& point, Backward& run) {
  Pending& held = run.pending[point.index];
  const auto here = [](const at::Tensor& tensor) {  // the backward's nodes may have run on another stream
    if (on_gpu(tensor)) read_on(current_stream(tensor.device()), tensor);
  };
  if (held.sum.defined()) here(held.sum);
  for (size_t number = 0; number < point.columns.size(); ++number) {
    Column& column = *point.columns[number];
    if (column.calls == Calls::sum && column.recipe.adds_gradients() && held.sum.defined())
      column.write(run.block->place(), {.grad = held.sum, .act = {}},
                   run.step_at(column, run.mask_on(held.sum.device())));
    if (number < held.sums.size() && held.sums[number].defined()) {
      here(held.sums[number]);
      column.put_sum(run.block->place(), held.sums[number]);
    }
    if (column.calls != Calls::stack || held.parts.empty()) continue;
    auto& parts = held.parts[number];
    for (const auto& part : parts) here(part);
    std::reverse(parts.begin(), parts.end());  // the last call of the forward fires first: index k is call k
    column.put_stack(run.block->place(), parts);
  }
}

// Write the sums of the rows of several points, in their order; NaN where one of these has none.
void finish_totals(const std::vector<std::shared_ptr<Point>>& points, Backward& run) {
  std::vector<std::pair<std::shared_ptr<Column>, at::Tensor>> sums;
  std::vector<Column*> missing;
  for (const auto& point : points) {
    for (size_t number = 0; number < point->columns.size(); ++number) {
      const auto& total = point->columns[number]->total;
      if (!total) continue;
      auto sum = std::find_if(sums.begin(), sums.end(), [&](const auto& one) { return one.first == total; });
      if (sum == sums.end()) sum = sums.emplace(sums.end(), total, at::Tensor());
      if (!run.fired[point->index]) {
        missing.push_back(total.get());
        continue;
      }
      const at::Tensor& part = run.pending[point->index].totals.at(number);
      if (on_gpu(part)) read_on(current_stream(part.device()), part);
      sum->second = sum->second.defined() ? sum->second.add(part.to(sum->second.device())) : part;
    }
  }
  for (const auto& [total, sum] : sums) {
    if (std::find(missing.begin(), missing.end(), total.get()) != missing.end())
      total->rows.fill_nan(run.block->place(), run.block->n);
    else
      total->put_sum(run.block->place(), sum);
  }
}

}  // namespace

std::shared_ptr<Backwards> Backwards::make(std::shared_ptr<Ledger> ledger, bool missing_is_nan) {
  std::shared_ptr<Backwards> made(new Backwards(std::move(ledger), missing_is_nan));
  made->look_around();
  return made;
}

void Backwards::add(const std::shared_ptr<Point>& point) {
  points.push_back(point);
  auto& columns = ledger->columns;
  for (const auto& column : point->columns) {
    const auto& held = column->total ? column->total : column;
    if (std::find(columns.begin(), columns.end(), held) == columns.end()) columns.push_back(held);
  }
}

void Backwards::set_batch(std::shared_ptr<const Batch> batch) {
  std::lock_guard<std::mutex> lock(mutex_);
  batch_.swap(batch);  // the one before is freed behind the lock: that may take the GIL
}

void Backwards::look_around() {
  n_around_ = n_backwards();
  task_around_ = current_task();
  if (task_around_ == -1) return;
  struct Ended {
    std::weak_ptr<Backwards> backwards;
    ~Ended() {
      if (const auto here = backwards.lock()) here->look_around();
    }
  };
  std::shared_ptr<Ended> ended(new Ended{weak_from_this()});
  autograd::Engine::get_default_engine().queue_callback([ended] {});
}

void Backwards::open(at::Tensor anchor_) {
  look_around();
  anchor = std::move(anchor_);
  opened_in_ = std::this_thread::get_id();
  ++run;
  active = true;
}

bool Backwards::runs_here() const { return opened_in_.load() == std::this_thread::get_id() || current_task() != -1; }

void Backwards::enter_forward() {
  const int64_t task = current_task();
  if (task == -1 || !active) return;
  std::lock_guard<std::mutex> lock(mutex_);
  // One inside another that isn't known waits for its first gradient.
  if (!find(task) && !nested() && task != task_around_) open(task);
}

bool Backwards::nested() const { return n_backwards() > n_around_ + 1; }

// The backward to which the running graph task belongs, or null if that isn't known yet.
std::shared_ptr<Backward> Backwards::find(int64_t task) {
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

std::shared_ptr<Backward> Backwards::open(int64_t task) {
  auto run = std::make_shared<Backward>();
  run->root = task;
  run->fired.resize(points.size());
  run->pending.resize(points.size());
  run->batch = batch_;
  follow(task, run);
  met_[std::this_thread::get_id()] = run;
  return run;
}

// Count a graph task, the running one, as a part of a backward.
void Backwards::follow(int64_t task, const std::shared_ptr<Backward>& run) {
  running_[task] = run;
  std::shared_ptr<End> end(new End{shared_from_this(), task, nested()});
  autograd::Engine::get_default_engine().queue_callback([end] { end->call(); });
}

void Backwards::forget(const std::shared_ptr<Backward>& run) {
  std::erase_if(running_, [&](const auto& entry) { return entry.second == run; });
  std::erase_if(met_, [&](const auto& entry) { return entry.second == run; });
  met_last_ = {};
}

Backwards::Begun Backwards::begin(const Point& point, const at::Tensor& grad) {
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
  const auto raises = [](const auto& column) { return column->calls == Calls::raise; };
  TORCH_CHECK(n_fired == 1 || std::none_of(point.columns.begin(), point.columns.end(), raises),
              broken_rule(point.who, "a point", "fire once in a backward", "a second time",
                          "Choose calls=\"sum\", \"last\" or \"stack\"."));
  for (const auto& column : point.columns) check_rows(point, *run, column->recipe.n_rows(grad.sizes()));
  if (on_gpu(grad)) run->write_on(current_stream(grad.device()), n_fired > 1, *ledger);
  return {run, run->block, n_fired};
}

void Backwards::check_rows(const Point& point, Backward& run, int64_t n) {
  TORCH_CHECK_VALUE(
      run.batch->n_expected < 0 || n == run.batch->n_expected,
      broken_rule(point.who, "a step", c10::str("have the ", run.batch->n_expected, " rows that batch() announced"), n,
                  "Check mask and ids; a reduced batch makes one row."));
  if (!run.block) run.block = ledger->reserve(point.who, n);
  TORCH_CHECK_VALUE(
      run.block->n == n,
      broken_rule(point.who, "a step", c10::str("have the same number of rows at every point (", run.block->n, ")"), n,
                  "Leave this point out, or capture it on its own."));
}

void Backwards::end(int64_t task) {
  const at::NoGradGuard no_grad;
  std::shared_ptr<Backward> run;  // outlives the lock: to free a mask may take the GIL
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = running_.find(task);
  if (found != running_.end()) run = found->second;
  if (!run || !run->block || !active) return abort_locked(task);
  for (const c10::Stream& caller : run->join_streams())
    for (const auto& column : ledger->columns) column->rows.used_on(caller);
  std::vector<int64_t> missing;
  for (const auto& point : points)
    if (!run->fired[point->index]) missing.push_back(int64_t(point->index));
  check_whole(task, *run, missing);
  Block& block = *run->block;
  if (!missing.empty() && !block.cursor) ledger->settle();
  for (int64_t index : missing)
    for (const auto& column : points[size_t(index)]->columns)
      if (!column->total) column->rows.fill_nan(block.place(), block.n);
  for (const auto& point : points)
    if (!run->pending[point->index].empty()) finish(*point, *run);
  finish_totals(points, *run);
  ledger->commit(block, std::move(missing));
  calls_before_ = n_calls;
  forget(run);
}

// An error, after which nothing of it is left, for a backward whose rows are not those of all its points.
void Backwards::check_whole(int64_t task, const Backward& run, const std::vector<int64_t>& missing) {
  std::string text;
  if (run.spoilt)
    text = broken_rule("capture", "a backward", "hold no other one that failed",
                       "one whose error was caught after it had reached a point",
                       "Let the error out, or run that one after this.");
  else if (!missing.empty() && !missing_is_nan)
    text = no_gradient(run, missing);
  if (text.empty()) return;
  abort_locked(task);
  TORCH_CHECK(false, text);
}

// The error for points without a gradient: which were not called, and which were to no effect.
std::string Backwards::no_gradient(const Backward& run, const std::vector<int64_t>& missing) const {
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

void Backwards::note_others(Point& point, std::string others) {
  std::lock_guard<std::mutex> lock(mutex_);
  point.others = std::move(others);
}

void Backwards::abort(int64_t task) {
  const auto kept = shared_inputs.forget();
  std::shared_ptr<Backward> run;  // as in `end`
  std::lock_guard<std::mutex> lock(mutex_);
  if (const auto found = running_.find(task); found != running_.end()) run = found->second;
  abort_locked(task);
}

void Backwards::abort_locked(int64_t task) {
  const auto found = running_.find(task);
  if (found == running_.end()) return;
  const auto run = found->second;
  calls_before_ = n_calls;
  run->give_up(*ledger);
  forget(run);
  if (run->block) ledger->abort(*run->block);
}

void Backwards::leave(int64_t task, bool ended_well) {
  std::shared_ptr<Backward> run;  // as in `end`
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = running_.find(task);
  if (found == running_.end()) return;
  run = found->second;
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

}  // namespace tlfast
