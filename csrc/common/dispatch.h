// SPDX-License-Identifier: Apache-2.0
// Runtime value -> template argument. A value outside the list is an error that names the list.
#pragma once

#include "check.h"
#include "dtype.h"

namespace fmkernels {

// Calls f.template operator()<T>() with T = float, Half or BFloat16.
template <class F>
void dispatch_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32: return f.template operator()<float>();
    case DType::kFloat16: return f.template operator()<Half>();
    case DType::kBFloat16: return f.template operator()<BFloat16>();
  }
}

// Calls f.template operator()<T, U>() for a second dtype that is float32 or the first one.
template <class F>
void dispatch_dtypes(DType dtype, DType second, F&& f) {
  dispatch_dtype(dtype, [&]<class T>() {
    if (second == dtype) f.template operator()<T, T>();
    else f.template operator()<T, float>();
  });
}

// Calls f.template operator()<T>() with T = Half or BFloat16.
template <class F>
void dispatch_half(DType dtype, F&& f) {
  FM_CHECK(dtype != DType::kFloat32, "dtype must be float16 or bfloat16");
  dtype == DType::kFloat16 ? f.template operator()<Half>() : f.template operator()<BFloat16>();
}

// Calls f.template operator()<value>(), for a value that is one of kValues.
template <int... kValues, class F>
void dispatch_int(const char* name, int value, F&& f) {
  const bool found = ((value == kValues ? (f.template operator()<kValues>(), true) : false) || ...);
  if (!found) {
    std::ostringstream list;
    ((list << ' ' << kValues), ...);
    fail(name, " must be one of", list.str(), ", got ", value);
  }
}

template <class F>
void dispatch_bool(bool value, F&& f) {
  value ? f.template operator()<true>() : f.template operator()<false>();
}

}  // namespace fmkernels
