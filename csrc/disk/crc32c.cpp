// CRC32C by SSE 4.2, by ARM's instruction, or by tables; three stripes at once hide the latency of the instruction.
#include "crc32c.h"

#include <array>
#include <cstring>

#include "kernel/isa.h"

#if defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

namespace tlfast {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // Castagnoli's, bits reversed: RFC 3720, appendix B.4
constexpr size_t kStripe = 4096;              // bytes, a power of two; three fit the first-level cache of any CPU

using Operator = std::array<uint32_t, 32>;  // a linear map of the register: the images of its 32 bits
using Tables = std::array<std::array<uint32_t, 256>, 8>;

constexpr uint32_t apply(const Operator& map, uint32_t crc) {
  uint32_t image = 0;
  for (int bit = 0; bit < 32; ++bit)
    if (crc >> bit & 1) image ^= map[bit];
  return image;
}

// What kStripe zero bytes make of the register.
constexpr Operator over_a_stripe() {
  Operator map{kPolynomial};  // over one zero bit
  for (int bit = 1; bit < 32; ++bit) map[bit] = uint32_t(1) << (bit - 1);
  for (size_t n_bits = 1; n_bits < kStripe * 8; n_bits *= 2) {
    Operator twice{};
    for (int bit = 0; bit < 32; ++bit) twice[bit] = apply(map, map[bit]);
    map = twice;
  }
  return map;
}

// over_a_stripe by the four bytes of the register.
constexpr std::array<std::array<uint32_t, 256>, 4> stripe_tables() {
  const Operator map = over_a_stripe();
  std::array<std::array<uint32_t, 256>, 4> tables{};
  for (int place = 0; place < 4; ++place)
    for (uint32_t byte = 0; byte < 256; ++byte) tables[place][byte] = apply(map, byte << (8 * place));
  return tables;
}

// Table k: what a byte makes of the register when k more bytes follow it.
constexpr Tables byte_tables() {
  Tables tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? kPolynomial : 0);
    tables[0][byte] = crc;
  }
  for (int k = 1; k < 8; ++k)
    for (int byte = 0; byte < 256; ++byte)
      tables[k][byte] = tables[k - 1][byte] >> 8 ^ tables[0][tables[k - 1][byte] & 255];
  return tables;
}

constexpr auto kOverStripe = stripe_tables();
constexpr Tables kTables = byte_tables();

inline uint64_t load(const unsigned char* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

// Eight bytes at a time, on any CPU of either byte order.
uint32_t by_tables(uint32_t crc, const unsigned char* data, size_t n) {
  for (; n >= 8; n -= 8, data += 8) {
    uint32_t next = 0;
    for (int k = 0; k < 8; ++k) next ^= kTables[7 - k][data[k] ^ (k < 4 ? crc >> (8 * k) & 255 : 0)];
    crc = next;
  }
  for (; n; --n) crc = crc >> 8 ^ kTables[0][(crc ^ *data++) & 255];
  return crc;
}

#if defined(TLFAST_X86)
#define TLFAST_CRC __attribute__((target("sse4.2")))
TLFAST_CRC inline uint64_t step8(uint64_t crc, uint64_t word) { return __builtin_ia32_crc32di(crc, word); }
TLFAST_CRC inline uint32_t step1(uint32_t crc, unsigned char byte) { return __builtin_ia32_crc32qi(crc, byte); }
const bool has_instruction = detect() != Isa::baseline && __builtin_cpu_supports("sse4.2");
constexpr const char* kInstruction = "sse4.2";
#elif defined(__ARM_FEATURE_CRC32)
#define TLFAST_CRC
inline uint64_t step8(uint64_t crc, uint64_t word) { return __crc32cd(uint32_t(crc), word); }
inline uint32_t step1(uint32_t crc, unsigned char byte) { return __crc32cb(crc, byte); }
constexpr bool has_instruction = true;
constexpr const char* kInstruction = "arm";
#else
constexpr bool has_instruction = false;
constexpr const char* kInstruction = "";
#endif

#if defined(TLFAST_CRC)
inline uint32_t over_stripe(uint32_t crc) {
  return kOverStripe[0][crc & 255] ^ kOverStripe[1][crc >> 8 & 255] ^ kOverStripe[2][crc >> 16 & 255] ^
         kOverStripe[3][crc >> 24];
}

TLFAST_CRC uint32_t by_instruction(uint32_t crc, const unsigned char* data, size_t n) {
  for (; n >= 3 * kStripe; n -= 3 * kStripe, data += 3 * kStripe) {
    uint64_t a = crc, b = 0, c = 0;
    for (size_t i = 0; i < kStripe; i += 8) {
      a = step8(a, load(data + i));
      b = step8(b, load(data + kStripe + i));
      c = step8(c, load(data + 2 * kStripe + i));
    }
    crc = over_stripe(over_stripe(uint32_t(a)) ^ uint32_t(b)) ^ uint32_t(c);
  }
  uint64_t rest = crc;
  for (; n >= 8; n -= 8, data += 8) rest = step8(rest, load(data));
  crc = uint32_t(rest);
  for (; n; --n) crc = step1(crc, *data++);
  return crc;
}
#else
uint32_t by_instruction(uint32_t crc, const unsigned char* data, size_t n) { return by_tables(crc, data, n); }
#endif

}  // namespace

uint32_t crc32c(uint32_t crc, const void* data, size_t n) {
  const auto* bytes = static_cast<const unsigned char*>(data);
  return ~(has_instruction ? by_instruction(~crc, bytes, n) : by_tables(~crc, bytes, n));
}

const char* crc32c_name() { return has_instruction ? kInstruction : "table"; }

}  // namespace tlfast
