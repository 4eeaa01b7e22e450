// The native module tlfast._C: a table of contents.
#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <tuple>
#include <variant>

#include "autograd/plain.h"
#include "autograd/sketcher.h"
#include "cuda_status.h"
#include "kernel/errors.h"
#include "py_callable.h"
#include "py_full_hooks.h"
#include "py_module_call.h"
#include "py_point_hooks.h"
#include "py_reduce.h"
#include "py_tap.h"

namespace py = pybind11;
using namespace tlfast;

namespace {

// What is applied in place of matrices: sketches, of the left and of the right one, and what whole gradients go
// through.
using Instead = std::tuple<std::shared_ptr<Sketcher>, std::shared_ptr<Sketcher>, std::shared_ptr<Whole>>;

// (kernel, stride, dilation, padding, padding mode, groups)
using WindowGiven = std::tuple<std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>, std::vector<int64_t>,
                               std::string, int64_t>;

void check_rows(int64_t rows) {
  TORCH_CHECK_VALUE(rows > 0, broken_rule("capture", "rows", "be a positive number", rows, "Give the rows to hold."));
}

std::shared_ptr<Column> make_column(const std::string& name, const std::string& reduce, std::vector<int64_t> dims,
                                    const std::optional<at::ScalarType>& dtype, int64_t capacity,
                                    const std::string& calls, const std::string& of,
                                    const std::optional<std::pair<int64_t, int64_t>>& heads,
                                    const std::optional<std::variant<int64_t, std::vector<int64_t>>>& at,
                                    std::shared_ptr<Weight> weight) {
  check_rows(capacity);
  Form form{.heads = heads, .at = {}};
  if (at) {
    const auto* const one = std::get_if<int64_t>(&*at);
    form.one = one;
    form.at = one ? std::vector<int64_t>{*one} : std::get<std::vector<int64_t>>(*at);
  }
  return std::make_shared<Column>(name, parse_reduction(reduce), std::move(dims), dtype, capacity, parse_calls(calls),
                                  parse_of(of), std::move(form), std::move(weight));
}

std::shared_ptr<Weight> make_weight(const std::string& layer,
                                    const std::variant<std::string, std::shared_ptr<FactorSums>>& row, bool bias,
                                    const std::optional<at::Tensor>& left, const std::optional<at::Tensor>& right,
                                    double scale, int64_t heads, int64_t padding_idx, std::pair<int64_t, double> norm,
                                    const std::optional<WindowGiven>& window, Instead instead,
                                    std::vector<at::Tensor> queries) {
  const auto* const sums = std::get_if<std::shared_ptr<FactorSums>>(&row);
  Window made;
  if (window) std::tie(made.kernel, made.stride, made.dilation, made.padding, made.padding_mode, made.groups) = *window;
  return std::make_shared<Weight>(
      Weight::Form{.layer = parse_layer(layer),
                   .row = sums ? WeightRow::sums : parse_weight_row(std::get<std::string>(row)),
                   .bias = bias,
                   .left = left,
                   .right = right,
                   .scale = scale,
                   .heads = heads,
                   .window = std::move(made),
                   .padding_idx = padding_idx,
                   .normalized = norm.first,
                   .eps = norm.second,
                   .left_sketch = std::get<0>(instead),
                   .right_sketch = std::get<1>(instead),
                   .queries = queries.empty() ? nullptr : std::make_shared<const Queries>(std::move(queries)),
                   .sums = sums ? *sums : nullptr,
                   .whole = std::get<2>(instead)});
}

std::shared_ptr<Whole> make_whole(std::optional<at::Tensor> factor, std::optional<at::Tensor> matrix,
                                  std::shared_ptr<Sketcher> sketch, const py::object& project) {
  return std::make_shared<Whole>(std::move(factor), std::move(matrix), std::move(sketch), change_of(project));
}

std::shared_ptr<Ledger> make_ledger(int64_t rows) {
  check_rows(rows);
  return std::make_shared<Ledger>(rows);
}

std::shared_ptr<Backwards> make_backwards(std::shared_ptr<Ledger> ledger, const std::string& missing) {
  TORCH_CHECK_VALUE(missing == "raise" || missing == "nan", broken_rule("capture", "missing", "be one of raise, nan",
                                                                        "'" + missing + "'", "Check the spelling."));
  return Backwards::make(std::move(ledger), missing == "nan");
}

std::shared_ptr<ColumnsKeeper> make_columns(const py::list& columns) {
  std::vector<std::shared_ptr<Column>> held;
  for (const py::handle& column : columns) {
    TORCH_CHECK_TYPE(py::isinstance<Column>(column),
                     broken_rule("capture", "columns", "hold native columns", py::repr(column).cast<std::string>(),
                                 "Make them by Column."));
    held.push_back(column.cast<std::shared_ptr<Column>>());
  }
  return std::make_shared<ColumnsKeeper>(std::move(held));
}

std::shared_ptr<CacheKeeper> make_cache_keeper(std::shared_ptr<TensorCache> cache, const std::string& name,
                                               const py::object& select, const std::string& calls) {
  Change change = change_of(select);
  const Calls known = parse_calls(calls);
  return std::make_shared<CacheKeeper>(std::move(cache), name, std::move(change), known);
}

// For each column that is given something of its own: its mask, what it is multiplied with, its positions.
using OwnOfColumn =
    std::tuple<const Column*, std::optional<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>>;

void set_batch(Backwards& backwards, const std::optional<at::Tensor>& mask, int64_t n_expected, double scale,
               const std::vector<OwnOfColumn>& own) {
  const auto input = [recording = backwards.ledger->recording()](const char* what,
                                                                 const std::optional<at::Tensor>& given) {
    return given ? std::optional<StepInput>(std::in_place, plain("batch", what, *given), recording) : std::nullopt;
  };
  const auto batch = std::make_shared<Batch>();
  batch->mask = input("mask", mask);
  batch->n_expected = n_expected;
  batch->scale = scale;
  for (const auto& [column, own_mask, ref, at] : own) {
    TORCH_CHECK_TYPE(column, broken_rule("batch", "own", "name native columns", "None", "Make them by Column."));
    batch->own.insert_or_assign(column, OwnInputs{input("mask", own_mask), input("ref", ref), at});
  }
  backwards.set_batch(batch);
}

void set_ref(Column& column, const std::optional<at::Tensor>& ref) {
  column.ref.reset();
  if (ref) column.ref.emplace(plain("capture", "ref", *ref), /*recording=*/false);
}

std::optional<at::Tensor> ref_of(const Column& column) {
  return column.ref ? std::optional(column.ref->tensor) : std::nullopt;
}

// An argument for which None doesn't stand: pybind11 would make a null pointer of it.
py::arg needed(const char* name) { return py::arg(name).none(false); }

std::optional<at::Tensor> defined(const at::Tensor& tensor) {
  return tensor.defined() ? std::optional<at::Tensor>(tensor) : std::nullopt;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native code of tlfast; tlfast.backends.python does the same in Python.";
  m.attr("NAME") = "native";
  m.attr("TORCH_VERSION") = c10::str(TORCH_VERSION_MAJOR, ".", TORCH_VERSION_MINOR);
  m.def("describe", [] { return c10::str("cpu, ", cpu_features()); });
  m.def("cuda_status", &cuda_status);
  m.def("cuda_capability", &cuda_capability);
  m.add_object("reduce_at_once", py::reinterpret_steal<py::object>(PyCFunction_New(&reduce_at_once, nullptr)));
  m.def("call_natively", &PyTap::call_natively);
  m.def("call_modules_natively", &ModuleCall::call_natively);
  m.def("choose_natively", &choose_natively);
  m.def("choose_for", &choose_for);
  m.def("learn_outputs", &learn_outputs);

  py::class_<FactorSums, std::shared_ptr<FactorSums>>(m, "FactorSums")
      .def(py::init<const std::string&>())
      .def("totals", &FactorSums::totals, py::call_guard<py::gil_scoped_release>());
  py::class_<Whole, std::shared_ptr<Whole>>(m, "Whole").def(py::init(&make_whole));
  py::class_<Weight, std::shared_ptr<Weight>>(m, "Weight").def(py::init(&make_weight));
  py::class_<Column, std::shared_ptr<Column>>(m, "Column")
      .def(py::init(&make_column))
      .def_readonly("name", &Column::name)
      .def_readwrite("total", &Column::total)
      .def_readwrite("masked", &Column::masked)
      .def_property("ref", &ref_of, &set_ref)
      .def_property_readonly("rows", [](const Column& column) { return defined(column.rows.tensor()); })
      .def_property_readonly("n_writes", [](const Column& column) { return column.rows.n_writes(); })
      .def_property_readonly("counters", [](const Column& column) { return column.rows.counters(); })
      .def_property_readonly("counted", [](const Column& column) {
        const Counts counts = column.rows.counted();
        return std::pair(counts.nonfinite, counts.saturated);
      });

  py::class_<Recording>(m, "Recording")
      .def_readonly("n_rows", &Recording::n_rows)
      .def_property_readonly("scratch", &Recording::scratch);

  py::class_<Ledger, std::shared_ptr<Ledger>>(m, "Ledger")
      .def(py::init(&make_ledger))
      .def("committed", &Ledger::committed)
      .def_property_readonly("extent", &Ledger::extent)
      .def_property_readonly("n_ended", [](const Ledger& ledger) { return ledger.n_ended.load(); })
      .def("clear", &Ledger::clear)
      .def("settle", &Ledger::settle)
      .def("start_recording", &Ledger::start_recording)
      .def("stop_recording", &Ledger::stop_recording)
      .def("start_trial", &Ledger::start_trial)
      .def("stop_trial", &Ledger::stop_trial)
      .def_property_readonly("recording", &Ledger::recording)
      .def_property_readonly("cursor", [](const Ledger& ledger) { return defined(ledger.cursor()); })
      .def("replay", &Ledger::replay)
      .def("take_back", &Ledger::take_back);

  py::class_<Backwards, std::shared_ptr<Backwards>>(m, "Backwards")
      .def(py::init(&make_backwards), needed("ledger"), py::arg("missing"))
      .def("set_batch", &set_batch)
      .def(
          "open",
          [](Backwards& backwards, const std::optional<at::Tensor>& anchor) {
            backwards.open(anchor.value_or(at::Tensor()));
          },
          py::arg("anchor"))
      .def("close", &Backwards::close)
      .def_property_readonly("runs_here", &Backwards::runs_here)
      .def_property_readonly("run", [](const Backwards& backwards) { return backwards.run.load(); })
      .def_property_readonly("anchor", [](const Backwards& backwards) { return defined(backwards.anchor); })
      .def_property_readonly("n_calls", [](const Backwards& backwards) { return backwards.n_calls.load(); });

  py::class_<TensorCache, std::shared_ptr<TensorCache>>(m, "TensorCache")
      .def(py::init([] { return std::make_shared<TensorCache>(); }))
      .def("clear", &TensorCache::clear)
      .def("outputs", &TensorCache::outputs)
      .def("gradients", &TensorCache::gradients)
      .def("clashes", &TensorCache::clashes)
      .def_property_readonly("n_outputs", &TensorCache::n_outputs);

  py::class_<Sketcher, std::shared_ptr<Sketcher>>(m, "Sketcher")
      .def(py::init<int64_t, int64_t, double, at::Tensor, std::optional<at::Tensor>, std::optional<at::Tensor>,
                    std::optional<at::Tensor>>(),
           py::arg("width"), py::arg("dim"), py::arg("scale"), needed("input_signs"), py::arg("shifts"),
           py::arg("output_signs"), py::arg("samples"))
      .def("rows", &Sketcher::rows, needed("x"), py::call_guard<py::gil_scoped_release>());

  m.def("waiting", &waiting);
  py::class_<Keeper, std::shared_ptr<Keeper>>(m, "Keeper");
  py::class_<ColumnsKeeper, Keeper, std::shared_ptr<ColumnsKeeper>>(m, "ColumnsKeeper").def(py::init(&make_columns));
  py::class_<CacheKeeper, Keeper, std::shared_ptr<CacheKeeper>>(m, "CacheKeeper")
      .def(py::init(&make_cache_keeper), needed("cache"), py::arg("name"), py::arg("select"), py::arg("calls"));
  py::class_<SinkKeeper, Keeper, std::shared_ptr<SinkKeeper>>(m, "SinkKeeper")
      .def(py::init(&sink_keeper), needed("sink"), py::arg("reduce"), py::arg("dims"));
  py::class_<PyTap>(m, "Tap")
      .def(py::init<std::shared_ptr<Backwards>, const std::string&, std::shared_ptr<Keeper>, py::object>(),
           needed("backwards"), py::arg("name"), needed("keeper"), py::arg("output"))
      .def("set_convert", &PyTap::set_convert)
      .def("set_side", &PyTap::set_side)
      .def("learn_references", &PyTap::learn_references)
      .def("forward_pre", [](const PyTap& tap) { tap.tap->forward_pre(); })
      .def("forward", [](PyTap& tap, const py::object&, const py::object& output) { return tap.forward(output); })
      .def("forward_of_layer", [](PyTap& tap, const py::tuple& inputs, const py::dict& named,
                                  const py::object& output) { return tap.forward(output, inputs, named); })
      .def("check_full", &PyTap::check_full)
      .def("full", &PyTap::full)
      .def_readonly("output", &PyTap::output)
      .def_property_readonly("backwards", [](const PyTap& tap) { return tap.tap->backwards; })
      .def_property_readonly("reads_outputs", [](const PyTap& tap) { return tap.tap->keeper->reads_outputs(); })
      .def_property_readonly("reads_inputs", [](const PyTap& tap) { return tap.tap->keeper->reads_inputs(); })
      .def_property_readonly("name", [](const PyTap& tap) { return tap.tap->point->name; })
      .def_property_readonly("others", [](const PyTap& tap) { return tap.tap->point->others; })
      .def_property_readonly("number", [](const PyTap& tap) { return tap.tap->number; })
      .def_property_readonly("last_call", [](const PyTap& tap) { return tap.tap->point->last_call.load(); });

  py::class_<ModuleCall>(m, "ModuleCall")
      .def(py::init<py::object, py::object, py::object, int64_t>(), py::arg("module"), py::arg("hook"),
           py::arg("before"), py::arg("holders"));
  py::class_<PointHooks>(m, "PointHooks")
      .def(py::init<const std::vector<PointHooks::Given>&, const py::int_&, std::vector<py::str>,
                    std::vector<py::str>>(),
           py::arg("points"), py::arg("hook_id"), py::arg("lists"), py::arg("own_ways"))
      .def("put", &PointHooks::put)
      .def("take_off", py::overload_cast<>(&PointHooks::take_off));
}
