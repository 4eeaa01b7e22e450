// One stack of its own that can be left and entered again: a CUDA thread, or the code that has launched it.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

constexpr size_t kPage = 4096;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;  // bytes; frames are larger by the zones between their variables
#else
constexpr size_t kStack = 64 << 10;
#endif

#if defined(__x86_64__)
// Keeps what a call has to keep (System V ABI: rbx, rbp, r12 to r15) on the stack that is left, and its place in *from.
// swapcontext would do the same with two system calls for the signal mask, for each switch.
extern "C" void simt_switch_stack(void** from, void* to);
#endif

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Begin anew with `main`, which must not return; the stack is made once. What was on it is forgotten.
  void start(void (*main)()) {
    if (!stack_) {
      void* memory = mmap(nullptr, kPage + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
        std::perror("simt: no memory for the stack of a fiber");
        std::abort();
      }
      stack_ = static_cast<char*>(memory) + kPage;  // stacks grow down, into the page that can't be touched
      size_ = kStack;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, size_);
    fake_ = nullptr;
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(stack_ + size_) - 1;  // at a function's entry rsp is 8 above a multiple of 16
    *--top = reinterpret_cast<void*>(main);
    top -= 6;  // six registers, of any value
    place_ = top;
#else
    getcontext(&context_);
    context_.uc_stack = {stack_, 0, size_};
    makecontext(&context_, main, 0);
#endif
  }

  // Leave this fiber for another; returns when someone enters this one again.
  void enter(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
    left_ = this;
    __sanitizer_start_switch_fiber(&fake_, other.stack_, other.size_);
#endif
#if defined(__x86_64__)
    simt_switch_stack(&place_, other.place_);
#else
    swapcontext(&context_, &other.context_);
#endif
    entered();
  }

  // To be called at the beginning of `main`, too.
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_, &bottom, &size);
    left_->stack_ = static_cast<char*>(const_cast<void*>(bottom));  // tells where the launching thread's stack lies
    left_->size_ = size;
#endif
  }

 private:
  char* stack_ = nullptr;
  size_t size_ = 0;
#if defined(__x86_64__)
  void* place_ = nullptr;
#else
  ucontext_t context_;
#endif
#if defined(__SANITIZE_ADDRESS__)
  void* fake_ = nullptr;
  static inline Fiber* left_ = nullptr;
#endif
};

}  // namespace simt
