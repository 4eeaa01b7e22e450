// Streams the rows of a unit into its open file; CRC32C and norms on the way; knows no torch and no Python.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "row_norms.h"

namespace tlfast {

constexpr int64_t kPage = 4096;  // the payload begins at a multiple of it, and O_DIRECT takes multiples of it

// Bytes behind a header of whole pages, through O_DIRECT where the filesystem takes it. Two threads write pieces while
// the caller computes checksum and norms, and does what it likes after that. Memory that lies at a page boundary is
// written where it is; any other goes through one block of piece_bytes for each of the threads.
class PayloadStream {
 public:
  // Goes on at `position`, a multiple of kPage, of a file whose bytes before that have the checksum `crc`.
  PayloadStream(int fd, int64_t position, uint32_t crc, int64_t piece_bytes);

  // Waits for the disk only, and no longer than for the piece that it is at.
  ~PayloadStream();

  // Write blocks of rows, one behind the other; the last bytes that fill no page are kept for the next call.
  // Returns when the norms are there: the memory belongs to the stream until the next call has returned. Memory that
  // goes on from block to block is one run. std::system_error where the disk fails, here or in the next call.
  void append(std::span<const UnitRows> blocks);

  // Wait for the disk, and write what is left. The content isn't durable before fdatasync.
  void finish();

  int64_t position() const { return position_ + n_kept_; }
  uint32_t crc() const { return crc_; }
  bool direct() const { return direct_; }

 private:
  struct Segment {
    const char* data;
    int64_t start, stop;  // bytes from position_
  };
  class Pieces;

  void wait();
  void write_all(const char* data, int64_t n, int64_t at);
  void leave_direct();

  const int fd_;
  const int64_t piece_bytes_;
  int64_t position_;
  uint32_t crc_;
  std::atomic<bool> direct_;
  std::mutex leaving_;
  int64_t n_kept_ = 0;
  char kept_[kPage];
  std::unique_ptr<Pieces> pieces_;  // the last: it is at work on the others
};

}  // namespace tlfast
