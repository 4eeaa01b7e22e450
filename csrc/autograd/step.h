// What all taps of one capture share: which backward is running, which rows are whose, what is committed.
#pragma once

#include <ATen/core/Tensor.h>

#include <atomic>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

#include "backward.h"

namespace tlfast {

enum class Calls { raise, sum, last, stack };

// What a tap knows of its place; the step keeps it, so that it can name the points that did not fire.
struct Point {
  std::string name, who;
  std::vector<std::shared_ptr<Ring>> rings;
  Calls calls;
  size_t index;
  std::atomic<int64_t> last_call{0};  // when the module was entered last, counted over the capture
  std::string others{};               // which other outputs have a graph, as the first call has shown
};

// What a recorded step does each time it is replayed.
struct Recording {
  int64_t n_rows;
  std::vector<int64_t> missing;
  struct Write {
    std::shared_ptr<Ring> ring;
    int64_t n;
    at::Tensor rows;  // where its kernels write
  };
  std::vector<Write> writes;
};

class Step : public std::enable_shared_from_this<Step> {
 public:
  static std::shared_ptr<Step> make(int64_t capacity, bool missing_is_nan) {
    std::shared_ptr<Step> step(new Step(capacity, missing_is_nan));
    step->look_around();
    return step;
  }

  // A capture may be made inside a backward, in a hook: that one and those around it hold its steps, and are none. This
  // finds them, and is called again as each of them ends.
  void look_around();

  // What holds for the next backwards: the mask, the number of examples (-1: unknown), the factor on rows.
  void set_batch(std::optional<at::Tensor> mask, int64_t n_expected, double scale);

  // A captured module runs forward; inside a backward (of a checkpoint, a hook) that is the step to come.
  // Returns whether there is one.
  bool enter_forward();

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

  // The rows of all committed backwards, and where the last of them ends: more only where others left holes.
  std::pair<int64_t, int64_t> extent() const;

  // (first row, rows, points that did not fire) of every committed backward, in order.
  std::vector<std::tuple<int64_t, int64_t, std::vector<int64_t>>> committed() const;

  void clear();

  // Let the current streams see all that was counted, also by backwards that failed.
  void settle() const;

  // Between these two, one backward is recorded by a CUDA graph: its kernels find their rows by the cursor on the
  // device, and move it on at the end. It makes no rows until it is replayed.
  void start_recording(const at::Device& device);
  Recording stop_recording();

  // Reserve and commit the rows of one replay, which is launched next; `take_back` where that failed.
  void replay(const Recording& recording);
  void take_back(const Recording& recording);

  // What runs between these two leaves rows and counts as they were: to warm up what is recorded next.
  void start_trial();
  void stop_trial();

  void close() { active = false; }

  // Remember which other outputs of a point have a graph, to name them where the one that was chosen has no gradient.
  void note_others(Point& point, std::string others);

  at::Tensor cursor() const { return cursor_; }

  const bool missing_is_nan;
  std::atomic<bool> active{true};
  std::atomic<int64_t> n_ended{0}, n_calls{0};
  std::vector<std::shared_ptr<Point>> points;

 private:
  Step(int64_t capacity, bool missing_is_nan) : missing_is_nan(missing_is_nan), capacity_(capacity) {}
  bool nested() const;
  std::shared_ptr<Backward> find(int64_t task);
  std::shared_ptr<Backward> open(int64_t task);
  void follow(int64_t task, const std::shared_ptr<Backward>& run);
  void forget(const std::shared_ptr<Backward>& run);
  void commit(Block& block);
  void check_rows(const Point& point, Backward& run, int64_t n);
  int64_t next_base() const { return blocks_.empty() ? 0 : blocks_.back()->base + blocks_.back()->n; }
  int64_t check_room(const std::string& who, int64_t n) const;
  void check_at_rest(const char* who) const;
  void come_after_failed() const;
  void abort_locked(int64_t task);
  void finish(const Point& point, Backward& run);
  std::string no_gradient(const Backward& run, const std::vector<int64_t>& missing) const;

  const int64_t capacity_;
  std::atomic<int64_t> n_around_{0}, task_around_{-1};  // the backwards around the capture, and the innermost of them
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Block>> blocks_;
  int64_t n_rows_ = 0;                                    // of the committed ones
  std::map<int64_t, std::shared_ptr<Backward>> running_;  // by the ids of its graph tasks
  // The backward that was last met in each thread: what runs inside another one in this thread is a part of it.
  std::map<std::thread::id, std::shared_ptr<Backward>> met_;
  std::pair<std::thread::id, Backward*> met_last_{};  // the same, without a search
  std::optional<Mask> mask_;
  std::vector<Done> failed_;  // the work of a backward that failed, whose rows the next one may write
  int64_t n_expected_ = -1;
  double scale_ = 1.0;
  int64_t calls_before_ = 0;  // those until the last backward ended

  at::Tensor cursor_;           // int64 [1] on the device: the row at which the next replay begins,
  int64_t cursor_stands_ = -1;  // and where it stands; -1: it must be set
  bool recording_ = false;
  std::vector<std::shared_ptr<Block>> before_;  // the blocks that were there when the recording or the trial began,
  int64_t n_rows_before_ = 0;                   // and their rows
};

}  // namespace tlfast
