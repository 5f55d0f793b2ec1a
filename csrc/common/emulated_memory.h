// SPDX-License-Identifier: Apache-2.0
// What the kernels of an emulated op may touch: the views whose address the op took, to the byte, while it launches.
//
// An op takes the addresses of its tensors, then launches, perhaps more than once. So views are noted one by one, are
// accessible during launches alone, and are forgotten by the first one that is noted after a launch.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include <register_memory.h>  // of the emulator

namespace fmkernels {

struct NotedView {
  const void* begin;
  uint64_t num_bytes;
  std::string name;
};
struct NotedViews {
  std::vector<NotedView> views;
  bool launched = false;
};
inline NotedViews& noted_views() {
  thread_local NotedViews noted;
  return noted;
}

// From the first element to the last; what lies between the elements of a strided view counts as its own.
template <class Sizes>
void note_view(const void* begin, const Sizes& sizes, const Sizes& strides, int64_t element_bytes) {
  NotedViews& noted = noted_views();
  if (noted.launched) noted = {};
  uint64_t last = 0;
  std::string name = "tensor [";
  for (size_t dim = 0; dim < sizes.size(); ++dim) {
    if (sizes[dim] == 0) return;
    last += static_cast<uint64_t>((sizes[dim] - 1) * strides[dim]);
    name += (dim == 0 ? "" : ", ") + std::to_string(sizes[dim]);
  }
  noted.views.push_back({begin, (last + 1) * element_bytes, name + "]"});
}

// The noted views are accessible as long as this lives.
class EmulatedLaunch {
 public:
  EmulatedLaunch() {
    for (const NotedView& view : noted_views().views) {
      emulator_register_memory(view.begin, view.num_bytes, view.name.c_str());
    }
  }
  ~EmulatedLaunch() {
    NotedViews& noted = noted_views();
    for (const NotedView& view : noted.views) emulator_unregister_memory(view.begin, view.num_bytes);
    noted.launched = true;
  }
  EmulatedLaunch(const EmulatedLaunch&) = delete;
  EmulatedLaunch& operator=(const EmulatedLaunch&) = delete;
};

}  // namespace fmkernels
