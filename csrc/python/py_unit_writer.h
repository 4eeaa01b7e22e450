// The stream of a unit's rows as Python sees it: addresses in, OSError out, no GIL in between.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <tuple>

#include "disk/unit_writer.h"

namespace tlfast {

uint32_t crc32c_of(const pybind11::buffer& data, uint32_t crc);

struct PyPayloadStream {
  // Address of the rows, how many, values of each, their dtype as tlfast.dataset.format.layout names it
  // (F64, F32, F16, BF16, I8), addresses of the norms (float32) and of what is odd (one byte), one of each per row.
  using Block = std::tuple<uintptr_t, int64_t, int64_t, std::string, uintptr_t, uintptr_t>;

  // `path` is what an OSError names.
  PyPayloadStream(int fd, int64_t position, uint32_t crc, int64_t piece_bytes, pybind11::object path);
  void append(const std::vector<Block>& blocks);
  void finish();
  // Waits for the pieces that are on their way: the memory is the caller's again.
  void close();
  const PayloadStream& open() const;

  const pybind11::object path;

 private:
  std::unique_ptr<PayloadStream> stream_;
};

}  // namespace tlfast
