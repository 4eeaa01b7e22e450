// The native module tlfast._C: a table of contents.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include "autograd/plain.h"
#include "cuda_status.h"
#include "disk/crc32c.h"
#include "kernel/errors.h"
#include "py_tap.h"
#include "py_unit_writer.h"

namespace py = pybind11;
using namespace tlfast;

namespace {

void check_rows(int64_t rows) {
  TORCH_CHECK_VALUE(rows > 0, broken_rule("capture", "rows", "be a positive number", rows, "Give the rows to hold."));
}

std::shared_ptr<Ring> make_ring(const std::string& column, const std::string& reduce, std::vector<int64_t> dims,
                                const std::optional<at::ScalarType>& dtype, int64_t capacity) {
  check_rows(capacity);
  return std::make_shared<Ring>(column, parse_reduction(reduce), std::move(dims), dtype, capacity);
}

std::shared_ptr<Step> make_step(int64_t rows, const std::string& missing) {
  check_rows(rows);
  TORCH_CHECK_VALUE(missing == "raise" || missing == "nan", broken_rule("capture", "missing", "be one of raise, nan",
                                                                        "'" + missing + "'", "Check the spelling."));
  return Step::make(rows, missing == "nan");
}

void set_batch(Step& step, const std::optional<at::Tensor>& mask, int64_t n_expected, double scale) {
  step.set_batch(mask ? std::optional(plain("batch", "mask", *mask)) : std::nullopt, n_expected, scale);
}

// An argument for which None doesn't stand: pybind11 would make a null pointer of it.
py::arg needed(const char* name) { return py::arg(name).none(false); }

std::optional<at::Tensor> defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

std::unique_ptr<PyTap> make_tap(std::shared_ptr<Step> step, const std::string& name, const py::list& rings,
                                const py::object& output, const std::string& calls) {
  std::vector<std::shared_ptr<Ring>> held;
  for (const py::handle& ring : rings) {
    TORCH_CHECK_TYPE(py::isinstance<Ring>(ring), broken_rule("capture", "rings", "hold native rings",
                                                             py::repr(ring).cast<std::string>(), "Make them by Ring."));
    held.push_back(ring.cast<std::shared_ptr<Ring>>());
  }
  return std::make_unique<PyTap>(Tap::make(std::move(step), name, held, parse_calls(calls)), output, rings);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native code of tlfast; tlfast.backends.ledger, taps and ring do the same in Python.";
  m.attr("TORCH_VERSION") = c10::str(TORCH_VERSION_MAJOR, ".", TORCH_VERSION_MINOR);
  m.def("describe", [] { return c10::str("cpu, ", cpu_features()); });
  m.def("cuda_status", &cuda_status);
  m.def("cuda_capability", &cuda_capability);
  m.def("call_natively", &PyTap::call_natively);

  py::class_<Ring, std::shared_ptr<Ring>>(m, "Ring")
      .def(py::init(&make_ring))
      .def_readonly("column", &Ring::column)
      .def_readwrite("masked", &Ring::masked)
      .def_property_readonly("rows", [](const Ring& ring) { return defined(ring.rows()); })
      .def_property_readonly("n_writes", &Ring::n_writes)
      .def_property_readonly("counters", &Ring::counters)
      .def_property_readonly("counted", [](const Ring& ring) {
        const Counts counts = ring.counted();
        return std::pair(counts.nonfinite, counts.saturated);
      });

  py::class_<Recording>(m, "Recording").def_readonly("n_rows", &Recording::n_rows);

  py::class_<Step, std::shared_ptr<Step>>(m, "Step")
      .def(py::init(&make_step))
      .def("set_batch", &set_batch)
      .def("committed", &Step::committed)
      .def_property_readonly("extent", &Step::extent)
      .def("clear", &Step::clear)
      .def("settle", &Step::settle)
      .def("start_recording", &Step::start_recording)
      .def("stop_recording", &Step::stop_recording)
      .def("start_trial", &Step::start_trial)
      .def("stop_trial", &Step::stop_trial)
      .def_property_readonly("cursor", [](const Step& step) { return defined(step.cursor()); })
      .def("replay", &Step::replay)
      .def("take_back", &Step::take_back)
      .def("close", &Step::close)
      .def_property_readonly("n_calls", [](const Step& step) { return step.n_calls.load(); })
      .def_property_readonly("n_ended", [](const Step& step) { return step.n_ended.load(); });

  py::class_<TensorCache, std::shared_ptr<TensorCache>>(m, "TensorCache")
      .def(py::init([] { return std::make_shared<TensorCache>(); }))
      .def("outputs", &TensorCache::outputs)
      .def("gradients", &TensorCache::gradients)
      .def("clashes", &TensorCache::clashes)
      .def_property_readonly("n_outputs", &TensorCache::n_outputs);

  m.def("crc32c", &crc32c_of);
  m.def("crc32c_name", &crc32c_name);
  py::class_<PyPayloadStream>(m, "PayloadStream")
      .def(py::init<int, int64_t, uint32_t, int64_t, py::object>())
      .def("append", &PyPayloadStream::append)
      .def("finish", &PyPayloadStream::finish)
      .def("close", &PyPayloadStream::close)
      .def_property_readonly("position", [](const PyPayloadStream& stream) { return stream.open().position(); })
      .def_property_readonly("crc", [](const PyPayloadStream& stream) { return stream.open().crc(); })
      .def_property_readonly("direct", [](const PyPayloadStream& stream) { return stream.open().direct(); });

  m.def("waiting", &waiting);
  py::class_<PyTap>(m, "Tap")
      .def(py::init(&make_tap), needed("step"), py::arg("name"), py::arg("rings"), py::arg("output"), py::arg("calls"))
      .def_static("to_sink", &PyTap::to_sink, needed("step"), py::arg("name"), needed("sink"), py::arg("reduce"),
                  py::arg("dims"), py::arg("output"))
      .def_static("to_cache", &PyTap::to_cache, needed("step"), py::arg("name"), needed("cache"), py::arg("select"),
                  py::arg("calls"), py::arg("anchor"))
      .def("set_convert", &PyTap::set_convert)
      .def("learn_references", &PyTap::learn_references)
      .def("forward_pre", [](const PyTap& tap) { tap.tap->forward_pre(); })
      .def("forward", [](PyTap& tap, const py::object&, const py::object& output) { return tap.forward(output); })
      .def("check_full", &PyTap::check_full)
      .def("full", &PyTap::full)
      .def_readonly("output", &PyTap::output)
      .def_readonly("rings", &PyTap::rings)
      .def_property_readonly("name", [](const PyTap& tap) { return tap.tap->point->name; })
      .def_property_readonly("others", [](const PyTap& tap) { return tap.tap->point->others; })
      .def_property_readonly("number", [](const PyTap& tap) { return tap.tap->number; })
      .def_property_readonly("last_call", [](const PyTap& tap) { return tap.tap->point->last_call.load(); });
}
