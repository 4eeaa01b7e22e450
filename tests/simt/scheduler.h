// The threads of a CUDA block as fibers that run one at a time and meet at collectives: what the shim stands on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// Of the thread that runs now; everything that another thread may change lies behind a call that isn't inlined.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

using Site = std::source_location;

constexpr unsigned kWarp = 32;

// Where threads can meet. Two kinds never meet each other.
enum class Meet : int { barrier, warp, shuffle, shuffle_up, shuffle_down, shuffle_xor, ballot, any, all };

// The place of the running thread in its warp.
unsigned lane();

// Wait until every thread of the block (barrier) or every lane in `mask` is at the same kind of call with the same
// mask. Returns `value` of lane `source`, poison (all bits set) if it isn't in the mask; for ballot, any and all the
// lanes in the mask whose value isn't 0.
uint64_t meet(Meet kind, uint32_t mask, uint64_t value, unsigned source, const Site& site);

// End the launch with cudaErrorLaunchFailure and a text: `simt: ` and what the arguments of printf make.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Before a block, set all bits of its shared memory; after it, whether what lies behind the dynamic part is still so.
void poison_shared(size_t dynamic_bytes);
bool shared_is_whole(size_t dynamic_bytes);

// Call `call(arguments)` once for each thread of the grid. Returns a cudaError_t.
int run(dim3 grid, dim3 block, size_t shared_bytes, void (*call)(void*), void* arguments);

}  // namespace simt

#pragma GCC visibility push(default)
extern "C" {
// Why the last launch that failed did, or "".
const char* simt_message();
// Who runs next, in the launches from now on: 0 the first thread that can, 1 the last, n >= 2 drawn with seed n; thread
// by thread if n is even, else warp by warp, and within a warp in any order.
void simt_set_order(int order);
}
#pragma GCC visibility pop
