// One product for all that read one input.
#include "shared_inputs.h"

#include <ATen/ops/cat.h>

#include <algorithm>
#include <utility>

#include "bare.h"
#include "capture.h"
#include "streams.h"

namespace tlfast {
namespace {

constexpr size_t kReaders = 16;  // of one product: a model whose experts all read one tensor has more
constexpr size_t kThreads = 16;  // whose last input is known

std::optional<c10::Stream> stream_of(const at::Tensor& tensor) {
  if (!on_gpu(tensor)) return {};
  return current_stream(tensor.device());
}

}  // namespace

SharedInputs::Seen::Seen(const at::Tensor& input, int64_t n_ended)
    : tensor(input.getIntrusivePtr()),
      memory(input.const_data_ptr()),
      sizes(input.sizes().vec()),
      strides(input.strides().vec()),
      version(input.unsafeGetTensorImpl()->version_counter().current_version()),
      stream(stream_of(input)),
      n_ended(n_ended) {}

bool SharedInputs::Seen::is(const at::Tensor& input, int64_t ended) const {
  return tensor._unsafe_get_target() == input.unsafeGetTensorImpl() && !tensor.expired() &&
         version == input.unsafeGetTensorImpl()->version_counter().current_version() &&
         memory == input.const_data_ptr() && input.sizes() == at::IntArrayRef(sizes) &&
         input.strides() == at::IntArrayRef(strides) && stream == stream_of(input) && n_ended == ended;
}

at::Tensor SharedInputs::keep(const std::string& who, const Reader& weight, const at::Tensor& input, int64_t n_ended) {
  // What has no version can be changed unseen; what doesn't fit is refused by the weight alone.
  if (!weight->shares(input) || !input.unsafeGetTensorImpl()->version_counter().enabled())
    return weight->keep(who, input);
  std::shared_ptr<Last> last, before, oldest;  // the two outlive the lock: see `forget`
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto here = std::this_thread::get_id();
    const auto found = std::find_if(last_.begin(), last_.end(), [&](const auto& one) { return one.first == here; });
    if (found != last_.end()) last = found->second;
    if (!last || !last->seen.is(input, n_ended)) {
      last = std::make_shared<Last>(Last{Seen(input, n_ended), {}});
      if (found != last_.end()) {
        before = std::move(found->second);
        last_.erase(found);
      }
      if (last_.size() == kThreads) {
        oldest = std::move(last_.front().second);
        last_.erase(last_.begin());
      }
      last_.emplace_back(here, last);
    }
  }
  const auto part_of = [&] {
    return std::find_if(last->parts.begin(), last->parts.end(),
                        [&](const Part& part) { return part.reader == weight; });
  };
  auto part = part_of();
  const bool made = part != last->parts.end(), again = made && part->taken;
  // A module that is called with it once more begins again: it may have been changed behind torch's back.
  if (again || (!made && last->parts.size() >= kReaders)) last->parts.clear();
  if (again || !made) {
    make(weight, input, *last);
    part = part_of();
  }
  part->taken = true;
  return part->made;
}

std::shared_ptr<void> SharedInputs::forget() {
  const std::lock_guard<std::mutex> lock(mutex_);
  const auto here = std::this_thread::get_id();
  const auto found = std::find_if(last_.begin(), last_.end(), [&](const auto& one) { return one.first == here; });
  if (found == last_.end()) return nullptr;
  const std::shared_ptr<void> kept = std::move(found->second);
  last_.erase(found);
  return kept;
}

// Makes the parts of all readers of the weight's group, to which those belong for which something was made before.
void SharedInputs::make(const Reader& weight, const at::Tensor& input, Last& last) {
  std::shared_ptr<Group> group;
  at::Tensor matrix;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    group = group_with(last.parts, weight);
    matrix = matrix_of(*group, input);
  }
  const auto made = Weight::keep_for(group->readers, input, matrix);
  const std::vector<Part> before = std::exchange(last.parts, {});
  for (size_t i = 0; i < group->readers.size(); ++i) {
    const auto& reader = group->readers[i];
    const auto known =
        std::find_if(before.begin(), before.end(), [&](const Part& part) { return part.reader == reader; });
    if (known == before.end()) {
      last.parts.push_back({reader, made[i], false});
      continue;
    }
    const Bare bare;
    known->made.copy_(made[i]);  // which a call holds: its version is that of what it keeps, and stays
    last.parts.push_back(*known);
  }
}

std::shared_ptr<SharedInputs::Group> SharedInputs::group_with(const std::vector<Part>& before, const Reader& weight) {
  const auto has = [](const std::vector<Reader>& readers, const Reader& one) {
    return std::find(readers.begin(), readers.end(), one) != readers.end();
  };
  std::vector<Reader> wanted;
  for (const Part& part : before) wanted.push_back(part.reader);
  const auto own =
      std::find_if(groups_.begin(), groups_.end(), [&](const auto& group) { return has(group->readers, weight); });
  if (own != groups_.end() && before.empty()) return *own;
  const std::vector<Reader> partners = own == groups_.end() ? std::vector<Reader>{weight} : (*own)->readers;
  for (const Reader& one : partners)
    if (!has(wanted, one)) wanted.push_back(one);
  std::erase_if(groups_, [&](const auto& group) {
    return std::any_of(wanted.begin(), wanted.end(), [&](const Reader& one) { return has(group->readers, one); });
  });
  groups_.push_back(std::make_shared<Group>(Group{std::move(wanted), {}}));
  return groups_.back();
}

at::Tensor SharedInputs::matrix_of(Group& group, const at::Tensor& input) {
  const Bare bare;
  const auto options = input.options().dtype(accumulator(input.scalar_type()));
  const auto stream = stream_of(input);
  for (const auto& [matrix, of] : group.matrices)
    if (of == stream && matrix.device() == options.device() && matrix.scalar_type() == options.dtype()) return matrix;
  std::vector<at::Tensor> parts;
  for (const Reader& reader : group.readers) parts.push_back(reader->right_for(options));
  const at::Tensor made = parts.size() == 1 ? parts[0] : at::cat(parts, 1);
  group.matrices.emplace_back(made, stream);
  if (stream && parts.size() > 1) used_.push_back(made);
  return made;
}

}  // namespace tlfast
