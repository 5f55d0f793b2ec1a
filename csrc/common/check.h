// SPDX-License-Identifier: Apache-2.0
// FM_CHECK(condition, message parts...): throws with one sentence. torch turns it into a Python RuntimeError.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fmkernels {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace fmkernels

#define FM_CHECK(condition, ...)                      \
  do {                                                \
    if (!(condition)) ::fmkernels::fail(__VA_ARGS__); \
  } while (0)
