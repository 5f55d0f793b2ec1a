// SPDX-License-Identifier: Apache-2.0
// dispatch_int for CPU kernels, of a value that was checked before. The text of an error is made by weak functions, of which
// the linker might keep an AVX2 object's copy for every processor.
#pragma once

#include "dispatch.h"

namespace fmkernels {

// Calls f.template operator()<value>(), for a value that is one of kValues; does nothing for another.
template <int... kValues, class F>
void dispatch_checked_int(int value, F&& f) {
  ((value == kValues ? f.template operator()<kValues>() : void()), ...);
}

}  // namespace fmkernels
