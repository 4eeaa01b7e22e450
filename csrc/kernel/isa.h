// One loop compiled for several instruction sets, chosen at run time: one build runs on any x86-64.
#pragma once

#include <cstdlib>
#include <string_view>

namespace tlfast {

#if defined(__x86_64__) && defined(__GNUC__)
#define TLFAST_X86 1
#define TLFAST_AVX2 __attribute__((target("avx2")))
#define TLFAST_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")))
#endif

enum class Isa { baseline, avx2, avx512 };

// What this CPU can do; TLFAST_CPU=avx2 or baseline stays below that, so that tests reach every kernel.
inline Isa detect() {
#if TLFAST_X86
  const char* set = std::getenv("TLFAST_CPU");
  const std::string_view most = set ? set : "";
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && most != "avx2" && most != "baseline") return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && most != "baseline") return Isa::avx2;
#endif
  return Isa::baseline;
}
inline const Isa isa = detect();

inline const char* isa_name() { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

// Run T::run(args...) compiled for this machine's instruction set.
template <class T>
struct For {
  template <class... Args>
  __attribute__((noinline)) static void baseline(Args... args) {
    T::run(args...);
  }
#if TLFAST_X86
  template <class... Args>
  TLFAST_AVX2 __attribute__((noinline)) static void avx2(Args... args) {
    T::run(args...);
  }
  template <class... Args>
  TLFAST_AVX512 __attribute__((noinline)) static void avx512(Args... args) {
    T::run(args...);
  }
#endif
  template <class... Args>
  static void here(Args... args) {
#if TLFAST_X86
    if (isa == Isa::avx512) return avx512(args...);
    if (isa == Isa::avx2) return avx2(args...);
#endif
    baseline(args...);
  }
};

}  // namespace tlfast
