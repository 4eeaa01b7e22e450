// Which fiber runs next, what completes a collective, and the text of what went wrong.
#include "scheduler.h"

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "fiber.h"
#include "order.h"
#include "simt.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace simt {
namespace {

constexpr unsigned kMostThreads = 1024;
constexpr const char* kNames[] = {"__syncthreads",  "__syncwarp",       "__shfl_sync",
                                  "__shfl_up_sync", "__shfl_down_sync", "__shfl_xor_sync",
                                  "__ballot_sync",  "__any_sync",       "__all_sync"};

struct Thread {
  Fiber fiber;
  uint3 index;
  enum { ready, waiting, exited } state;
  // What it waits at, and what it gets there.
  Meet kind;
  uint32_t mask;
  unsigned source;
  uint64_t value, result;
  Site site;
};

Thread threads[kMostThreads];
unsigned n_started = 0;  // fibers that exist and stand at the beginning of `life`

// The block that runs.
Fiber launcher;
unsigned n_threads, n_alive, n_at_barrier, current;
unsigned last_warp;                     // the one that has run, or kWarp where it has no claim to go on
uint32_t ready[kWarp], waiting[kWarp];  // lanes of each warp; waiting at a collective of the warp
uint32_t ready_warps;
void (*call)(void*);
void* arguments;

Order order;
bool running = false, failed = false;
std::string message;

void set_ready(unsigned t) {
  threads[t].state = Thread::ready;
  ready[t / kWarp] |= 1u << t % kWarp;
  ready_warps |= 1u << t / kWarp;
}

bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || !std::strcmp(a.file_name(), b.file_name()));
}

std::string at(unsigned t) {
  const Thread& thread = threads[t];
  const std::string who = "thread " + std::to_string(t);
  if (thread.state == Thread::exited) return who + " gone";
  const std::string file = thread.site.file_name();
  return who + " at " + kNames[int(thread.kind)] + ", " + file.substr(file.rfind('/') + 1) + ":" +
         std::to_string(thread.site.line());
}

// Nobody can go on, though somebody is left: why.
[[noreturn]] void fail_stuck() {
  const char* divergent =
      "divergent barrier: all threads must arrive at one __syncthreads, got %s and %s. Move it out of "
      "the branch.";
  for (unsigned t = 0; t < n_threads; ++t) {
    const Thread& one = threads[t];
    if (one.state != Thread::waiting || one.kind == Meet::barrier) continue;
    for (unsigned l = 0; l < kWarp; ++l) {
      const unsigned other = t / kWarp * kWarp + l;
      if (!(one.mask >> l & 1)) continue;
      const char* rule = "mask must name lanes that come to the same call, got 0x%x of %s, and %s. Name those alone.";
      if (other >= n_threads) fail(rule, one.mask, at(t).c_str(), ("no lane " + std::to_string(l)).c_str());
      const Thread& named = threads[other];
      if (named.state == Thread::waiting && named.kind == Meet::barrier)
        fail(divergent, at(other).c_str(), at(t).c_str());
      if (named.state == Thread::exited || named.kind != one.kind || named.mask != one.mask)
        fail(rule, one.mask, at(t).c_str(), at(other).c_str());
    }
  }
  unsigned first = 0, other = 0;
  while (threads[first].state != Thread::waiting) ++first;
  while (other < n_threads && threads[other].state == Thread::waiting && same(threads[other].site, threads[first].site))
    ++other;
  fail(divergent, at(first).c_str(), at(other < n_threads ? other : first).c_str());
}

// Let the next thread run; returns when this one may go on.
void give_way(Fiber& self) {
  if (!ready_warps) {
    if (!n_alive) return self.enter(launcher);
    fail_stuck();
  }
  const bool stay = order.warp_by_warp() && last_warp < kWarp && (ready_warps >> last_warp & 1);
  const unsigned warp = last_warp = stay ? last_warp : order.choose(ready_warps);
  const unsigned t = warp * kWarp + order.choose(ready[warp]);
  if (!(ready[warp] &= ~(1u << t % kWarp))) ready_warps &= ~(1u << warp);
  current = t;
  threadIdx = threads[t].index;
  if (&threads[t].fiber != &self) self.enter(threads[t].fiber);
}

// A fiber's life: one thread of each block.
void life() {
  threads[current].fiber.entered();
  for (;;) {
    call(arguments);
    Thread& self = threads[current];
    self.state = Thread::exited;
    --n_alive;
    give_way(self.fiber);
  }
}

void run_block(size_t shared_bytes) {
  poison_shared(shared_bytes);
  n_alive = n_threads;
  n_at_barrier = current = 0;
  last_warp = kWarp;
  std::fill(waiting, waiting + kWarp, 0);
  for (unsigned t = 0; t < n_threads; ++t) {
    if (t >= n_started) threads[n_started++].fiber.start(life);
    threads[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
    set_ready(t);
  }
  running = true;
  give_way(launcher);
  running = false;
  if (!shared_is_whole(shared_bytes) && !failed) {
    failed = true;
    message = "simt: a block must stay within its " + std::to_string(shared_bytes) +
              " bytes of dynamic shared memory, got a store behind them. Ask for more at the launch.";
  }
}

}  // namespace

unsigned lane() { return current % kWarp; }

void fail(const char* format, ...) {
  char text[1024];
  va_list list;
  va_start(list, format);
  std::vsnprintf(text, sizeof(text), format, list);
  va_end(list);
  message = std::string("simt: ") + text;
  if (!running) {
    std::fprintf(stderr, "%s\n", message.c_str());
    std::abort();
  }
  failed = true;
  n_started = 0;  // where the fibers stand now they can't go on: the next launch begins them anew
  threads[current].fiber.enter(launcher);
  std::abort();
}

uint64_t meet(Meet kind, uint32_t mask, uint64_t value, unsigned source, const Site& site) {
  const unsigned t = current, warp = t / kWarp, first = warp * kWarp;
  Thread& self = threads[t];
  self.kind = kind, self.mask = mask, self.value = value, self.source = source, self.site = site;
  self.state = Thread::waiting;
  if (kind == Meet::barrier) {
    const auto here = [&](const Thread& other) { return same(other.site, site); };
    if (++n_at_barrier == n_threads && std::all_of(threads, threads + n_threads, here)) {
      n_at_barrier = 0;
      last_warp = kWarp;
      for (unsigned other = 0; other < n_threads; ++other) set_ready(other);
    }
  } else {
    if (!(mask >> t % kWarp & 1))
      fail("mask must name its caller, got 0x%x of %s. Take part, or stay away.", mask, at(t).c_str());
    waiting[warp] |= 1u << t % kWarp;
    bool complete = (waiting[warp] & mask) == mask;
    uint32_t votes = 0;
    for (uint32_t rest = complete ? mask : 0; rest; rest &= rest - 1) {
      const Thread& other = threads[first + std::countr_zero(rest)];
      complete &= other.kind == kind && other.mask == mask;
      votes |= uint32_t(other.value != 0) << std::countr_zero(rest);
    }
    if (complete) {
      for (uint32_t rest = mask; rest; rest &= rest - 1) {
        Thread& other = threads[first + std::countr_zero(rest)];
        const bool there = mask >> other.source & 1;
        other.result = kind >= Meet::ballot ? votes : there ? threads[first + other.source].value : ~uint64_t(0);
        set_ready(first + std::countr_zero(rest));
      }
      waiting[warp] &= ~mask;
    }
  }
  give_way(self.fiber);
  return self.result;
}

int run(dim3 grid, dim3 block, size_t shared_bytes, void (*call_)(void*), void* arguments_) {
  const uint64_t per_block = uint64_t(block.x) * block.y * block.z;
  if (per_block == 0 || per_block > kMostThreads || block.z > 64 || grid.x == 0 || grid.y == 0 || grid.z == 0 ||
      grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  if (shared_bytes > kSharedMost) return cudaErrorInvalidValue;
  static std::mutex one_launch;  // threads of the host may launch at once, and there is one GPU
  const std::lock_guard<std::mutex> lock(one_launch);
  call = call_, arguments = arguments_;
  blockDim = block, gridDim = grid, n_threads = unsigned(per_block);
  order.start();
  failed = false;
  ready_warps = 0;
  std::fill(ready, ready + kWarp, 0);
  for (blockIdx.z = 0; blockIdx.z < grid.z && !failed; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < grid.y && !failed; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x && !failed; ++blockIdx.x) run_block(shared_bytes);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace simt

// GCC calls this where an address isn't a multiple of its type's alignment (-fsanitize=alignment), as a GPU would trap.
struct AlignmentSite {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
extern "C" void __ubsan_handle_type_mismatch_v1(AlignmentSite* site, uintptr_t address) {
  const std::string file = site->file;
  simt::fail("an address must be a multiple of %d, got %#zx at %s:%u. Load smaller pieces there.",
             1 << site->log_alignment, size_t(address), file.substr(file.rfind('/') + 1).c_str(), site->line);
}

const char* simt_message() { return simt::message.c_str(); }
void simt_set_order(int order) { simt::order = simt::Order(order); }
