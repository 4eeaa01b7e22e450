// The stream of a unit's rows as Python sees it.
#include "py_unit_writer.h"

#include <cerrno>
#include <optional>
#include <system_error>

#include "disk/crc32c.h"
#include "kernel/errors.h"

namespace py = pybind11;

namespace tlfast {
namespace {

std::optional<Dtype> parse_dtype(const std::string& name) {
  if (name == "I8") return std::nullopt;
  if (name == "F64") return Dtype::f64;
  if (name == "F32") return Dtype::f32;
  if (name == "F16") return Dtype::f16;
  if (name == "BF16") return Dtype::bf16;
  throw py::value_error(broken_rule("PayloadStream", "dtype", "be F64, F32, F16, BF16 or I8", name, "Cast it."));
}

// Do what may wait for the disk, without the GIL; what goes wrong there is an OSError that names the file.
template <class Work>
void at_the_disk(const py::object& path, Work work) {
  try {
    const py::gil_scoped_release release;
    work();
  } catch (const std::system_error& error) {
    errno = error.code().value();
    PyErr_SetFromErrnoWithFilenameObject(PyExc_OSError, path.ptr());
    throw py::error_already_set();
  }
}

}  // namespace

uint32_t crc32c_of(const py::buffer& data, uint32_t crc) {
  const py::buffer_info bytes = data.request();
  if (!PyBuffer_IsContiguous(bytes.view(), 'C'))
    throw py::value_error(broken_rule("crc32c", "data", "be contiguous", "a buffer with gaps", "Make bytes of it."));
  const py::gil_scoped_release release;
  return crc32c(crc, bytes.ptr, size_t(bytes.size) * size_t(bytes.itemsize));
}

PyPayloadStream::PyPayloadStream(int fd, int64_t position, uint32_t crc, int64_t piece_bytes, py::object path_)
    : path(std::move(path_)), stream_(std::make_unique<PayloadStream>(fd, position, crc, piece_bytes)) {}

const PayloadStream& PyPayloadStream::open() const {
  if (!stream_)
    throw py::value_error(broken_rule("PayloadStream", "stream", "be open", "a closed one", "Start another."));
  return *stream_;
}

void PyPayloadStream::append(const std::vector<Block>& blocks) {
  std::vector<UnitRows> rows;
  for (const auto& [data, n_rows, n_values, dtype, norms, odd] : blocks) {
    const std::optional<Dtype> type = parse_dtype(dtype);
    const bool there = n_rows == 0 || ((!type || (norms && odd)) && (data || n_values == 0));
    if (n_rows < 0 || n_values < 0 || !there)
      throw py::value_error(broken_rule("PayloadStream", "a block", "have the addresses of what it holds",
                                        c10::str(n_rows, " rows of ", n_values), "Pass what is allocated."));
    rows.push_back({reinterpret_cast<const void*>(data), n_rows, n_values, type, reinterpret_cast<float*>(norms),
                    reinterpret_cast<uint8_t*>(odd)});
  }
  open();
  at_the_disk(path, [&] { stream_->append(rows); });
}

void PyPayloadStream::finish() {
  open();
  at_the_disk(path, [&] { stream_->finish(); });
}

void PyPayloadStream::close() {
  const py::gil_scoped_release release;
  stream_.reset();
}

}  // namespace tlfast
