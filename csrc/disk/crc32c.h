// CRC32C (Castagnoli) of bytes, by the CPU's instruction where it has one; knows no torch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tlfast {

// Continue the checksum `crc` (0 at the start) with n bytes.
uint32_t crc32c(uint32_t crc, const void* data, size_t n);

// How it is computed here: "sse4.2", "arm" or "table".
const char* crc32c_name();

}  // namespace tlfast
