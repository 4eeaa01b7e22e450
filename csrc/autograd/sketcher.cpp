// A sketch of tensors on the CPU: what it is given is checked once, and then read without looking.
#include "sketcher.h"

#include <ATen/ops/empty.h>
#include <c10/core/GradMode.h>

#include "capture.h"
#include "kernel/errors.h"
#include "plain.h"

namespace tlfast {
namespace {

constexpr const char* kSketcher = "Sketcher";

at::Tensor held(const char* name, const std::optional<at::Tensor>& given, at::IntArrayRef shape, at::ScalarType dtype) {
  if (!given) return {};
  const bool fits = is_plain(*given) && given->is_cpu() && given->is_contiguous() && given->scalar_type() == dtype &&
                    given->sizes() == shape;
  TORCH_CHECK_VALUE(fits, broken_rule(kSketcher, name, "be contiguous on the CPU with shape " + list_of(shape),
                                      list_of(given->sizes()), "Make it by tlfast.projections."));
  return *given;
}

int64_t blocks_of(const at::Tensor& input_signs, int64_t width) {
  const bool fits = input_signs.dim() == 2 && width > 0 && c10::isFloatingType(input_signs.scalar_type());
  TORCH_CHECK_VALUE(fits, broken_rule(kSketcher, "input_signs", "be floats [n_parts, columns] in blocks of a width",
                                      list_of(input_signs.sizes()), "Make it by tlfast.projections."));
  return (input_signs.size(1) + width - 1) / width;
}

}  // namespace

Sketcher::Sketcher(int64_t width, int64_t dim, double scale, at::Tensor input_signs,
                   const std::optional<at::Tensor>& shifts, const std::optional<at::Tensor>& output_signs,
                   const std::optional<at::Tensor>& samples)
    : input_signs_(std::move(input_signs)),
      shifts_(held("shifts", shifts, {input_signs_.size(0), blocks_of(input_signs_, width)}, at::kLong)),
      output_signs_(
          held("output_signs", output_signs, {blocks_of(input_signs_, width), width}, input_signs_.scalar_type())),
      samples_(held("samples", samples, {dim}, at::kLong)),
      sketch_{input_signs_.size(1), width, input_signs_.size(0), dim, scale, nullptr, nullptr, nullptr, nullptr} {
  held("input_signs", input_signs_, input_signs_.sizes(),
       input_signs_.scalar_type() == at::kDouble ? at::kDouble : at::kFloat);
  check_numbers();
  sketch_.input_signs = input_signs_.const_data_ptr();
  if (shifts_.defined()) sketch_.shifts = shifts_.const_data_ptr<int64_t>();
  if (output_signs_.defined()) sketch_.output_signs = output_signs_.const_data_ptr();
  if (samples_.defined()) sketch_.samples = samples_.const_data_ptr<int64_t>();
}

// No number may lead out of the memory.
void Sketcher::check_numbers() const {
  const bool counts = shifts_.defined() && !output_signs_.defined() && !samples_.defined() &&
                      sketch_.dim == sketch_.n_parts * sketch_.width;
  const bool power = (sketch_.width & (sketch_.width - 1)) == 0;
  const bool transforms = !shifts_.defined() && output_signs_.defined() && samples_.defined() && sketch_.n_parts == 1 &&
                          sketch_.dim >= 1 && sketch_.dim <= sketch_.width && power;
  TORCH_CHECK_VALUE(counts || transforms,
                    broken_rule(kSketcher, "dim", "be that of a count sketch or of a Hadamard sketch", sketch_.dim,
                                "Make it by tlfast.projections."));
  const at::Tensor& numbers = counts ? shifts_ : samples_;
  for (int64_t i = 0; i < numbers.numel(); ++i) {
    const int64_t number = numbers.const_data_ptr<int64_t>()[i];
    TORCH_CHECK_VALUE(number >= 0 && number < sketch_.width, broken_rule(kSketcher, counts ? "shifts" : "samples",
                                                                         c10::str("be from 0 to ", sketch_.width - 1),
                                                                         number, "Make it by tlfast.projections."));
  }
}

std::optional<at::Tensor> Sketcher::rows(const at::Tensor& x) const {
  if (!is_plain(x) || (x.requires_grad() && c10::GradMode::is_enabled())) return std::nullopt;
  const bool wide = x.scalar_type() == at::kDouble;
  const bool fits = x.dim() == 2 && x.is_cpu() && dtype_of(x.scalar_type()) && x.size(1) == sketch_.columns &&
                    (x.size(1) < 2 || x.stride(1) == 1) && wide == (input_signs_.scalar_type() == at::kDouble);
  TORCH_CHECK_VALUE(fits, broken_rule(kSketcher, "x", c10::str("be floats [n, ", sketch_.columns, "] on the CPU"),
                                      list_of(x.sizes()), "Call tlfast.projections.apply."));
  at::Tensor out = at::empty({x.size(0), sketch_.dim}, x.options());
  sketch_rows(sketch_, *dtype_of(x.scalar_type()), x.const_data_ptr(), x.stride(0), x.size(0), out.mutable_data_ptr());
  return out;
}

}  // namespace tlfast
