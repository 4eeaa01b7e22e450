// Arithmetic of ours, apart from what holds around it.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>

namespace tlfast {

// What is computed here has no history, and the dtypes that it says: autocast would make other ones of them.
class Bare {
 public:
  Bare() : no_autocast_(c10::autocast_dispatch_keyset) {}

 private:
  const at::AutoDispatchBelowADInplaceOrView no_autograd_;
  const c10::impl::ExcludeDispatchKeyGuard no_autocast_;
};

}  // namespace tlfast
