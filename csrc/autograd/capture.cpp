// The fused ops: schemas, checks, geometry; dispatch by device.
#include "capture.h"

#include <ATen/MemoryOverlap.h>
#include <torch/library.h>

#include <algorithm>
#include <cctype>

#include "device.h"
#include "kernel/errors.h"
#include "plain.h"

namespace tlfast {

std::optional<Dtype> dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return Dtype::f32;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kHalf:
      return Dtype::f16;
    case at::kDouble:
      return Dtype::f64;
    default:  // of torch's many others
      return std::nullopt;
  }
}

namespace {

std::string name_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat:
      return "torch.float32";
    case at::kDouble:
      return "torch.float64";
    case at::kHalf:
      return "torch.float16";
    case at::kBFloat16:
      return "torch.bfloat16";
    case at::kLong:
      return "torch.int64";
    case at::kInt:
      return "torch.int32";
    case at::kShort:
      return "torch.int16";
    case at::kChar:
      return "torch.int8";
    case at::kByte:
      return "torch.uint8";
    case at::kComplexFloat:
      return "torch.complex64";
    case at::kComplexDouble:
      return "torch.complex128";
    default: {  // the rest is called in Python as in C++, in lower case
      std::string name = c10::toString(dtype);
      std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
      return "torch." + name;
    }
  }
}

void check(const std::string& who, const at::Tensor& out, const at::Tensor& grad, at::IntArrayRef dims) {
  TORCH_CHECK_VALUE(dtype_of(grad.scalar_type()), broken_rule(who, "grad", "be float32, bfloat16, float16 or float64",
                                                              name_of(grad.scalar_type()), "Cast it first."));
  const bool stored =
      dtype_of(out.scalar_type()) && (out.scalar_type() != at::kDouble || grad.scalar_type() == at::kDouble);
  TORCH_CHECK_VALUE(stored, broken_rule(who, "out", "be float32, bfloat16 or float16 (float64 for float64 gradients)",
                                        name_of(out.scalar_type()), "Choose another stored dtype."));
  TORCH_CHECK_VALUE(
      out.device() == grad.device(),
      broken_rule(who, "out", c10::str("be on ", grad.device(), ", as grad is"), out.device(), "Move one of them."));
  const auto want = reduced_shape(grad.sizes(), dims);
  TORCH_CHECK_VALUE(out.sizes() == at::IntArrayRef(want), broken_rule(who, "out", "have shape " + list_of(want),
                                                                      list_of(out.sizes()), "Check over= and shapes."));
  TORCH_CHECK_VALUE(at::has_internal_overlap(out) != at::MemOverlap::Yes,
                    broken_rule(who, "out", "have memory of its own for each element", "an expanded tensor",
                                "Pass a contiguous one."));
  TORCH_CHECK_VALUE(!out.has_storage() || !out.is_alias_of(grad) || out.numel() == 0,
                    broken_rule(who, "out", "not share memory with grad", "a view of it", "Pass a tensor of its own."));
}

void check_ref(const std::string& who, const at::Tensor& ref, const at::Tensor& out, const at::Tensor& grad,
               Reduction reduction) {
  check_reduces_products(who, reduction);
  TORCH_CHECK_VALUE(dtype_of(ref.scalar_type()), broken_rule(who, "ref", "be float32, bfloat16, float16 or float64",
                                                             name_of(ref.scalar_type()), "Cast it first."));
  TORCH_CHECK_VALUE(ref.sizes() == grad.sizes(), broken_rule(who, "ref", "have grad's shape " + list_of(grad.sizes()),
                                                             list_of(ref.sizes()), "Use ref.expand_as(grad)."));
  TORCH_CHECK_VALUE(
      ref.device() == grad.device(),
      broken_rule(who, "ref", c10::str("be on ", grad.device(), ", as grad is"), ref.device(), "Move one of them."));
  TORCH_CHECK_VALUE(!out.has_storage() || !out.is_alias_of(ref) || out.numel() == 0,
                    broken_rule(who, "out", "not share memory with ref", "a view of it", "Pass a tensor of its own."));
}

View view_of(const at::Tensor& out, const at::Tensor& grad, const std::optional<at::Tensor>& mask, at::IntArrayRef dims,
             Reduction reduction, const std::optional<at::Tensor>& ref) {
  ViewBuilder builder;
  int64_t out_dim = 0;
  for (int64_t d = 0; d < grad.dim(); ++d) {
    const int64_t mask_stride = mask && d < mask->dim() ? mask->stride(d) : 0, ref_stride = ref ? ref->stride(d) : 0;
    if (std::find(dims.begin(), dims.end(), d) != dims.end())
      builder.reduce({grad.size(d), grad.stride(d), 0, mask_stride, ref_stride});
    else
      builder.keep({grad.size(d), grad.stride(d), out.stride(out_dim++), mask_stride, ref_stride});
  }
  return builder.build(reduction == Reduction::last);
}

CudaCapture call_of(const Plan& plan, const Operands& with, const OnDevice& there) {
  return {.view = plan.view,
          .reduction = plan.reduction,
          .grad_dtype = plan.dtypes.grad,
          .out_dtype = plan.dtypes.out,
          .ref_dtype = plan.dtypes.ref,
          .scale = with.scale,
          .grad = with.grad,
          .ref = with.ref,
          .out = with.out,
          .mask = static_cast<const uint8_t*>(with.mask),
          .cursor = there.cursor,
          .row_elements = there.row_elements,
          .counters = there.counters,
          .scratch = there.scratch.defined() ? there.scratch.mutable_data_ptr() : nullptr,
          .gather = with.gather};
}

void capture(const at::Tensor& out, const at::Tensor& given, const std::optional<at::Tensor>& given_ref,
             c10::string_view reduce, at::IntArrayRef over, const std::optional<at::Tensor>& given_mask, double scale) {
  const at::Tensor grad = plain("capture", "grad", given);
  const auto ref = given_ref ? std::optional(plain("capture", "ref", *given_ref)) : std::nullopt;
  const auto mask = given_mask ? std::optional(plain("capture", "mask", *given_mask)) : std::nullopt;
  check_destination("capture", "out", out);
  const Plan plan = make_plan("capture", out, grad, parse_reduction(std::string(reduce)), over, mask, ref);
  run_plan("capture", plan, out, grad, mask, scale, nullptr, ref);
}

void capture_op(at::Tensor out, const at::Tensor& grad, c10::string_view reduce, at::IntArrayRef over,
                const std::optional<at::Tensor>& mask, double scale) {
  capture(out, grad, std::nullopt, reduce, over, mask, scale);
}

void capture_product_op(at::Tensor out, const at::Tensor& grad, const at::Tensor& ref, c10::string_view reduce,
                        at::IntArrayRef over, const std::optional<at::Tensor>& mask, double scale) {
  capture(out, grad, ref, reduce, over, mask, scale);
}

// out[k, b] = sum_d grad[b, positions[k], d] * directions[k, d]: [K, B] of [B, P, D], int64 [K] and [K, D].
void gather_op(at::Tensor out, const at::Tensor& given, const at::Tensor& positions, const at::Tensor& directions) {
  const std::string who = "gather_into";
  const at::Tensor grad = plain(who, "grad", given), ref = plain(who, "directions", directions);
  const at::Tensor chosen = plain(who, "positions", positions);
  check_destination(who, "out", out);
  const bool fits = grad.dim() == 3 && ref.dim() == 2 && chosen.dim() == 1 && ref.size(1) == grad.size(2) &&
                    ref.size(0) == chosen.size(0) && grad.size(1) > 0 && chosen.is_contiguous() &&
                    chosen.scalar_type() == at::kLong && chosen.device() == grad.device();
  TORCH_CHECK_VALUE(
      fits, broken_rule(who, "grad, positions and directions", "be [B, P, D], int64 [K] and [K, D]",
                        c10::str(list_of(grad.sizes()), ", ", list_of(chosen.sizes()), " and ", list_of(ref.sizes())),
                        "Check the widths."));
  const auto* const numbers = chosen.const_data_ptr<int64_t>();
  const int64_t n = chosen.numel(), length = grad.size(1);
  for (int64_t k = 0; grad.is_cpu() && k < n; ++k)  // on a GPU who calls has looked
    TORCH_CHECK_VALUE(
        0 <= numbers[k] && numbers[k] < length,
        broken_rule(who, "positions", c10::str("lie within ", length, " positions"), numbers[k], "Count from 0."));
  // The inner dimension must be one that both have side by side, not that of the positions. Where the width is 1, no
  // other one may be left: then what is chosen is copied.
  const bool copied = grad.size(2) == 1;
  const at::Tensor held = copied ? grad.index_select(1, chosen) : grad.stride(2) == 1 ? grad : grad.contiguous();
  const std::vector<int64_t> sizes{n, held.size(0), held.size(2)};
  const at::Tensor first = copied ? held.transpose(0, 1) : held.select(1, 0).unsqueeze(0).expand(sizes);
  const at::Tensor factor = ref.unsqueeze(1).expand(sizes);
  const Plan plan = make_plan(who, out, first, Reduction::sum, {2}, {}, factor);
  if (plan.empty) return;
  const Operands with{.grad = first.const_data_ptr(),
                      .ref = factor.const_data_ptr(),
                      .mask = nullptr,
                      .out = out.mutable_data_ptr(),
                      .scale = 1.0,
                      .gather = copied ? Gather{} : Gather{.positions = numbers, .n = n, .stride = held.stride(1)}};
  if (!on_gpu(held)) return void(plan.run(with));
  plan.launch(who, current_stream(held.device()), with, {.scratch = plan.scratch(held)});
}

}  // namespace

Reduction parse_reduction(const std::string& name) {
  int i = 0;
  for (const char* known : kReductionNames) {
    if (name == known) return Reduction(i);
    ++i;
  }
  const std::string rule = c10::str("be one of ", c10::Join(", ", kReductionNames));
  TORCH_CHECK_VALUE(false, broken_rule("capture", "reduce", rule, "'" + name + "'", "Check the spelling."));
}

std::vector<int64_t> normal_dims(const std::string& who, at::IntArrayRef dims, int64_t n_dims) {
  std::vector<int64_t> out;
  for (int64_t d : dims) {
    TORCH_CHECK_VALUE(-n_dims <= d && d < n_dims,
                      broken_rule(who, "over", c10::str("name dimensions of a ", n_dims, "-d gradient"), d,
                                  "Check the gradient's shape."));
    out.push_back(d < 0 ? d + n_dims : d);
  }
  std::sort(out.begin(), out.end());
  if (std::adjacent_find(out.begin(), out.end()) != out.end()) {
    std::string given = list_of(dims);
    given.front() = '(', given.back() = ')';
    TORCH_CHECK_VALUE(false, broken_rule(who, "over", "name each dimension once", given, "Remove the repeated one."));
  }
  return out;
}

std::vector<int64_t> reduced_shape(at::IntArrayRef shape, at::IntArrayRef dims) {
  std::vector<int64_t> out;
  for (int64_t d = 0; d < int64_t(shape.size()); ++d)
    if (std::find(dims.begin(), dims.end(), d) == dims.end()) out.push_back(shape[d]);
  return out;
}

void check_reduces_products(const std::string& who, Reduction reduction) {
  TORCH_CHECK_VALUE(reduces_products(reduction),
                    broken_rule(who, "reduce", "be none, sum, mean or last where there is a ref",
                                c10::str("'", kReductionNames[size_t(reduction)], "'"),
                                "Keep each product by \"none\", and reduce these by reduce_into."));
}

void check_mask(const std::string& who, const at::Tensor& mask, const at::Tensor& grad) {
  TORCH_CHECK_VALUE(mask.scalar_type() == at::kBool, broken_rule(who, "mask", "be boolean", name_of(mask.scalar_type()),
                                                                 "Use mask.bool(); True means a real token."));
  std::string remedy = "Pass the attention mask of this very batch.";
  if (mask.dim() == 2 && grad.dim() > 1 && grad.size(0) == mask.size(0) && grad.size(1) > mask.size(1))
    remedy +=
        c10::str(" It covers the positions that a model adds, too: ", grad.size(1) - mask.size(1), " virtual tokens?");
  const bool leads = mask.dim() > 0 && mask.dim() <= grad.dim() && mask.sizes() == grad.sizes().slice(0, mask.dim());
  TORCH_CHECK_VALUE(leads,
                    broken_rule(who, "mask", "have the leading sizes of a gradient of shape " + list_of(grad.sizes()),
                                list_of(mask.sizes()), remedy));
  TORCH_CHECK_VALUE(
      mask.device() == grad.device(),
      broken_rule(who, "mask", c10::str("be on ", grad.device(), ", as grad is"), mask.device(), "Move one of them."));
}

Counts Plan::run(const Operands& with) const {
  if (empty) return {};
  return capture_cpu(view, reduction, dtypes, with);
}

void Plan::launch(const std::string& who, const c10::Stream& stream, const Operands& with,
                  const OnDevice& there) const {
  if (empty) return;
  launch_capture(who, stream, call_of(*this, with, there));
}

at::Tensor Plan::scratch(const at::Tensor& like) const { return scratch_for(call_of(*this, {}, {}), like); }

Counts run_plan(const std::string& who, const Plan& plan, const at::Tensor& out, const at::Tensor& grad,
                const std::optional<at::Tensor>& mask, double scale, int64_t* counters,
                const std::optional<at::Tensor>& ref) {
  if (plan.empty) return {};
  const Operands with{.grad = grad.const_data_ptr(),
                      .ref = ref ? ref->const_data_ptr() : nullptr,
                      .mask = mask ? mask->const_data_ptr() : nullptr,
                      .out = out.mutable_data_ptr(),
                      .scale = scale};
  if (!on_gpu(grad)) return plan.run(with);
  plan.launch(who, current_stream(grad.device()), with, {.counters = counters, .scratch = plan.scratch(grad)});
  return {};
}

Plan make_plan(const std::string& who, const at::Tensor& out, const at::Tensor& grad, Reduction reduction,
               at::IntArrayRef over, const std::optional<at::Tensor>& mask, const std::optional<at::Tensor>& ref) {
  const auto dims = reduction == Reduction::none ? std::vector<int64_t>() : normal_dims(who, over, grad.dim());
  check(who, out, grad, dims);
  if (ref) check_ref(who, *ref, out, grad, reduction);
  if (mask) check_mask(who, *mask, grad);
  TORCH_CHECK_VALUE(grad.is_cpu() || on_gpu(grad), broken_rule(who, "grad", "be where the native code runs",
                                                               grad.device(), "Use backend=\"python\"."));
  const Dtypes dtypes{.grad = *dtype_of(grad.scalar_type()),
                      .out = *dtype_of(out.scalar_type()),
                      .ref = ref ? *dtype_of(ref->scalar_type()) : Dtype::f32};
  return {view_of(out, grad, mask, dims, reduction, ref), reduction, dtypes, out.numel() == 0};
}

TORCH_LIBRARY_FRAGMENT(tlfast, library) {
  library.def("capture(Tensor(a!) out, Tensor grad, str reduce, int[] over, Tensor? mask=None, float scale=1.0) -> ()",
              {at::Tag::pt2_compliant_tag});
  // An op of its own: the schema of the other one lies in graphs that were compiled and saved.
  library.def(
      "capture_product(Tensor(a!) out, Tensor grad, Tensor ref, str reduce, int[] over, Tensor? mask=None, "
      "float scale=1.0) -> ()",
      {at::Tag::pt2_compliant_tag});
  library.def("gather(Tensor(a!) out, Tensor grad, Tensor positions, Tensor directions) -> ()");
}

// For every device and layout: what can't be done is refused in our own words.
TORCH_LIBRARY_IMPL(tlfast, CompositeExplicitAutograd, library) {
  library.impl("capture", capture_op);
  library.impl("capture_product", capture_product_op);
  library.impl("gather", gather_op);
}

}  // namespace tlfast
