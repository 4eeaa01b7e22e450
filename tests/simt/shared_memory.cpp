// The shared memory of the block that runs: where it lies, and how it is poisoned and watched.
#include <link.h>

#include <algorithm>
#include <cstring>

#include "simt.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

thread_local __align__(128) unsigned char tlfast_shared[simt::kSharedMost + simt::kSharedZone];

namespace simt {
namespace {

struct Range {
  unsigned char *begin = nullptr, *end = nullptr;
};

// The thread_local variables of this library: the arrays that kernels declare as __shared__, and tlfast_shared.
Range all_shared() {
  Range found;
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* result) {
        auto* begin = static_cast<unsigned char*>(info->dlpi_tls_data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
          auto* end = begin + info->dlpi_phdr[i].p_memsz;
          if (info->dlpi_phdr[i].p_type == PT_TLS && begin && begin <= tlfast_shared && tlfast_shared < end)
            *static_cast<Range*>(result) = {begin, end};
        }
        return 0;
      },
      &found);
  return found;
}

}  // namespace

void poison_shared(size_t dynamic_bytes) {
  unsigned char* behind = tlfast_shared + sizeof(tlfast_shared);
  static const unsigned char* of = nullptr;  // each thread of the host has its own, and most often it is the same one
  static Range all;
  if (of != tlfast_shared) all = all_shared(), of = tlfast_shared;
  std::memset(all.begin, 0xff, tlfast_shared - all.begin);
  std::memset(behind, 0xff, all.end - behind);
  std::memset(tlfast_shared, 0xff, dynamic_bytes + kSharedZone);
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(tlfast_shared + dynamic_bytes, sizeof(tlfast_shared) - dynamic_bytes);
#endif
}

bool shared_is_whole(size_t dynamic_bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(tlfast_shared, sizeof(tlfast_shared));
#endif
  const unsigned char* zone = tlfast_shared + dynamic_bytes;
  return std::all_of(zone, zone + kSharedZone, [](unsigned char byte) { return byte == 0xff; });
}

}  // namespace simt
