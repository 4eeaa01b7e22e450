// The native module tlfast._disk: addresses in, OSError out, no GIL in between. It links no torch, so any torch will
// do.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cerrno>
#include <optional>
#include <system_error>
#include <tuple>

#include "codes.h"
#include "crc32c.h"
#include "kernel/errors.h"
#include "unit_writer.h"

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

uint32_t crc32c_of(const py::buffer& data, uint32_t crc) {
  const py::buffer_info bytes = data.request();
  if (!PyBuffer_IsContiguous(bytes.view(), 'C'))
    throw py::value_error(broken_rule("crc32c", "data", "be contiguous", "a buffer with gaps", "Make bytes of it."));
  const py::gil_scoped_release release;
  return crc32c(crc, bytes.ptr, size_t(bytes.size) * size_t(bytes.itemsize));
}

// The stream of a unit's rows as Python sees it.
struct PyPayloadStream {
  // Address of the rows, how many, values of each, their dtype as tlfast.dataset.format.layout names it
  // (F64, F32, F16, BF16, I8), addresses of the norms (float32) and of what is odd (one byte), one of each per row.
  using Block = std::tuple<uintptr_t, int64_t, int64_t, std::string, uintptr_t, uintptr_t>;

  // `path` is what an OSError names.
  PyPayloadStream(int fd, int64_t position, uint32_t crc, int64_t piece_bytes, py::object path);
  static UnitRows rows_of(const Block& block);
  void append(const std::vector<Block>& blocks);
  void finish();
  // Waits for the pieces that are on their way: the memory is the caller's again.
  void close();
  const PayloadStream& open() const;

  const py::object path;

 private:
  std::unique_ptr<PayloadStream> stream_;
};

PyPayloadStream::PyPayloadStream(int fd, int64_t position, uint32_t crc, int64_t piece_bytes, py::object path_)
    : path(std::move(path_)), stream_(std::make_unique<PayloadStream>(fd, position, crc, piece_bytes)) {}

const PayloadStream& PyPayloadStream::open() const {
  if (!stream_)
    throw py::value_error(broken_rule("PayloadStream", "stream", "be open", "a closed one", "Start another."));
  return *stream_;
}

UnitRows PyPayloadStream::rows_of(const Block& block) {
  const auto& [data, n_rows, n_values, dtype, norms, odd] = block;
  const std::optional<Dtype> type = parse_dtype(dtype);
  const bool there = n_rows == 0 || ((!type || (norms && odd)) && (data || n_values == 0));
  if (n_rows < 0 || n_values < 0 || !there)
    throw py::value_error(broken_rule("PayloadStream", "a block", "have the addresses of what it holds",
                                      std::to_string(n_rows) + " rows of " + std::to_string(n_values),
                                      "Pass what is allocated."));
  return {reinterpret_cast<const void*>(data), n_rows, n_values, type, reinterpret_cast<float*>(norms),
          reinterpret_cast<uint8_t*>(odd)};
}

void PyPayloadStream::append(const std::vector<Block>& blocks) {
  std::vector<UnitRows> rows;
  for (const Block& block : blocks) rows.push_back(rows_of(block));
  open();
  at_the_disk(path, [&] { stream_->append(rows); });
}

// What codes are (int8, float8_e4m3fn or int4), how many rows of how many values, the values that share a scale, and
// the addresses of codes and scales.
using Coded = std::tuple<std::string, int64_t, int64_t, int64_t, uintptr_t, uintptr_t>;

CodedRows coded_rows(const std::string& who, const Coded& coded) {
  const auto& [kind, n_rows, n_values, block, codes, scales] = coded;
  if (kind != "int8" && kind != "float8_e4m3fn" && kind != "int4")
    throw py::value_error(broken_rule(who, "codes", "be int8, float8_e4m3fn or int4", kind, "Encode in Python."));
  const CodeKind parsed = kind == "int8" ? CodeKind::int8 : kind == "int4" ? CodeKind::int4 : CodeKind::float8;
  const bool whole_bytes = parsed != CodeKind::int4 || block % 2 == 0 || block >= n_values;
  if (n_rows < 0 || n_values < 1 || block < 1 || !whole_bytes || (n_rows && !(codes && scales)))
    throw py::value_error(broken_rule(
        who, "codes", "be whole bytes at an address",
        std::to_string(n_rows) + " rows of " + std::to_string(n_values) + " in blocks of " + std::to_string(block),
        "Pass what is allocated."));
  return {parsed, n_rows, n_values, block, reinterpret_cast<uint8_t*>(codes), reinterpret_cast<float*>(scales)};
}

// By which random numbers rows are rounded: the two halves of the key, and the addresses of the numbers of examples and
// of the positions.
using Random = std::tuple<uint32_t, uint32_t, uintptr_t, uintptr_t>;

void encode_from(uintptr_t rows, const std::string& row_dtype, float per_code, const Coded& coded,
                 const std::optional<Random>& random) {
  const char* who = "encode_rows";
  const CodedRows to = coded_rows(who, coded);
  if (row_dtype != "F32" && row_dtype != "F16" && row_dtype != "BF16")
    throw py::value_error(broken_rule(who, "row_dtype", "be F32, F16 or BF16", row_dtype, "Cast the rows."));
  if (!rows) throw py::value_error(broken_rule(who, "rows", "have an address", rows, "Pass what is allocated."));
  const Dtype dtype = *parse_dtype(row_dtype);
  std::optional<Rounding> rounding;
  if (random) {
    const auto& [first, second, examples, positions] = *random;
    const bool cut = to.block < to.n_values && to.block % 4 != 0;  // a block would begin within four drawn numbers
    if (cut || !examples || !positions)
      throw py::value_error(broken_rule(who, "random", "be of blocks of fours, with addresses", "another",
                                        "Round to the nearest, or encode in Python."));
    rounding = Rounding{
        {first, second}, reinterpret_cast<const int64_t*>(examples), reinterpret_cast<const int64_t*>(positions)};
  }
  const py::gil_scoped_release release;
  encode_rows(reinterpret_cast<const void*>(rows), dtype, per_code, to, rounding ? &*rounding : nullptr);
}

void norms_of_codes(const Coded& coded, const std::vector<int64_t>& lengths, uintptr_t norms) {
  const char* who = "decoded_norms";
  const CodedRows from = coded_rows(who, coded);
  int64_t left = from.n_rows;
  for (const int64_t length : lengths) left = length < 0 || length > left ? -1 : left - length;
  if (left)
    throw py::value_error(broken_rule(who, "lengths", "be those of all " + std::to_string(from.n_rows) + " rows",
                                      list_of(lengths), "Count the rows of each example."));
  if (!norms) throw py::value_error(broken_rule(who, "norms", "have an address", norms, "Pass what is allocated."));
  const py::gil_scoped_release release;
  decoded_norms(from, lengths, reinterpret_cast<float*>(norms));
}

void PyPayloadStream::finish() {
  open();
  at_the_disk(path, [&] { stream_->finish(); });
}

void PyPayloadStream::close() {
  const py::gil_scoped_release release;
  stream_.reset();
}

}  // namespace
}  // namespace tlfast

PYBIND11_MODULE(_disk, m) {
  using namespace tlfast;
  m.doc() = "The native writer of units; tlfast.dataset.write.payload does the same in Python.";
  m.def("crc32c", &crc32c_of);
  m.def("crc32c_name", &crc32c_name);
  m.def("encode_rows", &encode_from);
  m.def("decoded_norms", &norms_of_codes);
  py::class_<PyPayloadStream>(m, "PayloadStream")
      .def(py::init<int, int64_t, uint32_t, int64_t, py::object>())
      .def("append", &PyPayloadStream::append)
      .def("finish", &PyPayloadStream::finish)
      .def("close", &PyPayloadStream::close)
      .def_property_readonly("position", [](const PyPayloadStream& stream) { return stream.open().position(); })
      .def_property_readonly("crc", [](const PyPayloadStream& stream) { return stream.open().crc(); })
      .def_property_readonly("direct", [](const PyPayloadStream& stream) { return stream.open().direct(); });
}
