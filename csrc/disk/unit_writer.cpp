// Streams the rows of a unit into its open file: whole pages by two threads, the checksum and the norms beside them.
#include "unit_writer.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include "crc32c.h"

namespace tlfast {
namespace {

constexpr int64_t kThreads = 2;               // one prepares the next write while the disk is at the other's
constexpr int64_t kSummaryBytes = 128 << 10;  // read once for checksum and norms: fits the second-level cache

struct FreePages {
  void operator()(char* block) const { ::operator delete(block, std::align_val_t(kPage)); }
};
using Pages = std::unique_ptr<char, FreePages>;

Pages pages(int64_t n_bytes) { return Pages(static_cast<char*>(::operator new(n_bytes, std::align_val_t(kPage)))); }

bool at_page(const void* data) { return reinterpret_cast<uintptr_t>(data) % kPage == 0; }

// Ask for O_DIRECT on an open file, or give it up; whether the file is now as asked.
bool set_direct(int fd, bool wanted) {
#if defined(O_DIRECT)
  const int flags = fcntl(fd, F_GETFL);
  return flags >= 0 && fcntl(fd, F_SETFL, wanted ? flags | O_DIRECT : flags & ~O_DIRECT) == 0;
#else
  return !wanted;
#endif
}

// The checksum goes on from block to block, the norms go row by row; each row is fetched from memory once.
uint32_t summarise(std::span<const UnitRows> blocks, uint32_t crc) {
  for (const UnitRows& rows : blocks) {
    const int64_t row_bytes = rows.row_bytes();
    const int64_t step = std::max<int64_t>(1, row_bytes ? kSummaryBytes / row_bytes : rows.n_rows);
    for (int64_t first = 0; first < rows.n_rows; first += step) {
      const int64_t last = std::min(first + step, rows.n_rows);
      crc = crc32c(crc, static_cast<const char*>(rows.data) + first * row_bytes, (last - first) * row_bytes);
      row_norms(rows, first, last);
    }
  }
  return crc;
}

}  // namespace

// What two threads write, one piece after the other, until none is left or one of them has failed.
class PayloadStream::Pieces {
 public:
  // The whole pages of a run, to `position`. `kept` are the bytes that its first segment consists of, if any were.
  Pieces(PayloadStream& stream, std::vector<Segment> run, std::vector<char> kept, int64_t n_bytes)
      : stream_(stream), run_(std::move(run)), kept_(std::move(kept)), n_bytes_(n_bytes), position_(stream.position_) {
    const int64_t n_pieces = (n_bytes + stream.piece_bytes_ - 1) / stream.piece_bytes_;
    try {
      while (int64_t(threads_.size()) < std::min(kThreads, n_pieces)) threads_.emplace_back([this] { take(); });
    } catch (const std::system_error&) {  // no more threads to be had: fewer do as well
      if (threads_.empty()) take();
    }
  }

  ~Pieces() {
    failed_ = true;  // if they are still at work, nobody wants the rest
    join();
  }

  void finish() {
    join();
    if (error_) std::rethrow_exception(error_);
  }

 private:
  void take() {
    try {
      Pages block;
      for (int64_t start; !failed_ && (start = next_.fetch_add(stream_.piece_bytes_)) < n_bytes_;) {
        const int64_t stop = std::min(start + stream_.piece_bytes_, n_bytes_);
        stream_.write_all(in_one(start, stop, block), stop - start, position_ + start);
      }
    } catch (...) {
      const std::lock_guard lock(mutex_);
      if (!error_) error_ = std::current_exception();
      failed_ = true;
    }
  }

  // The bytes start <= i < stop of the run: where they lie if they can be written from there, else copied to the block.
  const char* in_one(int64_t start, int64_t stop, Pages& block) const {
    auto segment = std::upper_bound(run_.begin(), run_.end(), start,
                                    [](int64_t at, const Segment& other) { return at < other.stop; });
    const char* there = segment->data + (start - segment->start);
    if (stop <= segment->stop && (at_page(there) || !stream_.direct_)) return there;
    if (!block) block = pages(stream_.piece_bytes_);
    for (int64_t at = start; at < stop; ++segment) {
      const int64_t n = std::min(stop, segment->stop) - at;
      std::memcpy(block.get() + (at - start), segment->data + (at - segment->start), n);
      at += n;
    }
    return block.get();
  }

  void join() {
    for (std::thread& thread : threads_)
      if (thread.joinable()) thread.join();
  }

  PayloadStream& stream_;
  const std::vector<Segment> run_;
  const std::vector<char> kept_;
  const int64_t n_bytes_, position_;
  std::atomic<int64_t> next_{0};
  std::atomic<bool> failed_{false};
  std::mutex mutex_;
  std::exception_ptr error_;
  std::vector<std::thread> threads_;
};

PayloadStream::PayloadStream(int fd, int64_t position, uint32_t crc, int64_t piece_bytes)
    : fd_(fd), piece_bytes_(piece_bytes), position_(position), crc_(crc), direct_(set_direct(fd, true)) {
  if (position < 0 || position % kPage || piece_bytes <= 0 || piece_bytes % kPage)
    throw std::invalid_argument("PayloadStream: position and piece_bytes must be multiples of 4096, got " +
                                std::to_string(position) + " and " + std::to_string(piece_bytes) +
                                ". Pad the header to whole pages.");
}

PayloadStream::~PayloadStream() = default;

void PayloadStream::append(std::span<const UnitRows> blocks) {
  wait();
  std::vector<char> kept(kept_, kept_ + n_kept_);
  std::vector<Segment> run;
  int64_t n_bytes = 0;
  const auto add = [&](const void* data, int64_t n) {
    const char* bytes = static_cast<const char*>(data);
    if (n == 0) return;
    if (!run.empty() && run.back().data + (run.back().stop - run.back().start) == bytes)
      run.back().stop += n;
    else
      run.push_back({bytes, n_bytes, n_bytes + n});
    n_bytes += n;
  };
  add(kept.data(), n_kept_);
  for (const UnitRows& rows : blocks) add(rows.data, rows.n_rows * rows.row_bytes());

  const int64_t n_whole = n_bytes / kPage * kPage;
  for (const Segment& segment : run) {
    const int64_t from = std::max(segment.start, n_whole);
    if (from < segment.stop)
      std::memcpy(kept_ + (from - n_whole), segment.data + (from - segment.start), segment.stop - from);
  }
  pieces_ = std::make_unique<Pieces>(*this, std::move(run), std::move(kept), n_whole);
  n_kept_ = n_bytes - n_whole;
  position_ += n_whole;
  crc_ = summarise(blocks, crc_);
}

void PayloadStream::wait() {
  if (pieces_) pieces_->finish();
  pieces_.reset();
}

void PayloadStream::finish() {
  wait();
  leave_direct();  // the rest fills no page; nor does the header that follows have to lie at one
  write_all(kept_, n_kept_, position_);
}

void PayloadStream::write_all(const char* data, int64_t n, int64_t at) {
  while (n > 0) {
    const bool direct = direct_;  // the other thread may give it up meanwhile
    const ssize_t written = pwrite(fd_, data, n, at);
    if (written < 0 && errno == EINTR) continue;
    // A filesystem may take the flag and refuse the write.
    if (written < 0 && errno == EINVAL && direct) {
      leave_direct();
      continue;
    }
    if (written <= 0) throw std::system_error(written ? errno : EIO, std::generic_category());
    if (written % kPage) leave_direct();  // the disk may be full: what is left begins within a page
    data += written, at += written, n -= written;
  }
}

void PayloadStream::leave_direct() {
  const std::lock_guard lock(leaving_);
  if (direct_) set_direct(fd_, false);
  direct_ = false;  // after the flag is gone: who reads this writes from any address
}

}  // namespace tlfast
