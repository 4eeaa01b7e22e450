// Which backward of a capture is running, found by the engine's graph tasks; and what was said of its batch.
#pragma once

#include <atomic>
#include <map>
#include <thread>

#include "backward.h"
#include "shared_inputs.h"

namespace tlfast {

// What is known of a tap's place, to name it in errors.
struct Point {
  std::string name, who;
  std::vector<std::shared_ptr<Column>> columns;
  size_t index;
  std::atomic<int64_t> last_call{0};  // when the module was entered last, counted over the capture
  std::string others{};               // which other outputs have a graph, as the first call has shown
};

class Backwards : public std::enable_shared_from_this<Backwards> {
 public:
  static std::shared_ptr<Backwards> make(std::shared_ptr<Ledger> ledger, bool missing_is_nan);

  // A capture may be made inside a backward, in a hook: that one and those around it hold its steps, and are none. This
  // finds them, and is called again as each of them ends.
  void look_around();

  // What holds for the next backwards.
  void set_batch(std::shared_ptr<const Batch> batch);

  // Count a point, before the first backward.
  void add(const std::shared_ptr<Point>& point);

  // A captured module runs forward; inside a backward (of a checkpoint, a hook) that is the step to come.
  void enter_forward();

  // Find the running backward and its rows; every check that needs no gradient values is made here.
  struct Begun {
    std::shared_ptr<Backward> run;
    std::shared_ptr<Block> block;
    int n_fired;
  };
  Begun begin(const Point& point, const at::Tensor& grad);

  // The end of the outermost backward: commit its rows at all points together, or none of them.
  void end(int64_t task);

  // Forget a backward that failed: its rows are void.
  void abort(int64_t task);

  // A backward inside another one is gone, after it ended well or not. What it has begun goes on as a part of the one
  // around it, which is the current one of this thread again.
  void leave(int64_t task, bool ended_well);

  // A run begins, with taps that were in one before, perhaps: what earlier calls left in a graph fires nothing in it.
  // With an anchor, a leaf to which every identity node of the run leads, backward(inputs=[anchor]) runs whatever leads
  // to one, and makes no gradient of a parameter.
  void open(at::Tensor anchor);
  void close() { active = false; }

  // Whether a call is one of the run: of the thread that has opened it, or made again in a backward. What another
  // thread does with the model meanwhile is none.
  bool runs_here() const;

  // Remember which other outputs of a point have a graph, to name them where the one that was chosen has no gradient.
  void note_others(Point& point, std::string others);

  const std::shared_ptr<Ledger> ledger;
  const bool missing_is_nan;
  std::atomic<bool> active{true};
  std::atomic<int64_t> run{0};
  at::Tensor anchor;                // of the run
  std::atomic<int64_t> n_calls{0};  // of the modules of all points
  std::vector<std::shared_ptr<Point>> points;
  SharedInputs shared_inputs;

 private:
  Backwards(std::shared_ptr<Ledger> ledger, bool missing_is_nan)
      : ledger(std::move(ledger)), missing_is_nan(missing_is_nan) {}
  bool nested() const;
  std::shared_ptr<Backward> find(int64_t task);
  std::shared_ptr<Backward> open(int64_t task);
  void follow(int64_t task, const std::shared_ptr<Backward>& run);
  void forget(const std::shared_ptr<Backward>& run);
  void check_rows(const Point& point, Backward& run, int64_t n);
  void check_whole(int64_t task, const Backward& run, const std::vector<int64_t>& missing);
  void abort_locked(int64_t task);
  std::string no_gradient(const Backward& run, const std::vector<int64_t>& missing) const;

  std::atomic<std::thread::id> opened_in_{};
  std::atomic<int64_t> n_around_{0}, task_around_{-1};  // the backwards around the capture, and the innermost of them
  mutable std::mutex mutex_;
  std::map<int64_t, std::shared_ptr<Backward>> running_;  // by the ids of its graph tasks
  // The backward that was last met in each thread: what runs inside another one in this thread is a part of it.
  std::map<std::thread::id, std::shared_ptr<Backward>> met_;
  std::pair<std::thread::id, Backward*> met_last_{};  // the same, without a search
  std::shared_ptr<const Batch> batch_ = std::make_shared<const Batch>();
  int64_t calls_before_ = 0;  // those until the last backward ended
};

}  // namespace tlfast
