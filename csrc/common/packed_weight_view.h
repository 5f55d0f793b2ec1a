// SPDX-License-Identifier: Apache-2.0
// The tensors of a packed weight as its products read them. Included by op files only.
#pragma once

#include "packed_weight.h"
#include "tensor.h"

namespace fmkernels {

inline PackedWeight view_packed_weight(const Tensor& values, const Tensor& scales, const std::optional<Tensor>& zeros,
                                       int64_t bits, int64_t group_size, int64_t out_features, int64_t in_features) {
  FM_CHECK(bits == 8 || bits == 4, "bits must be 8 or 4, got ", bits);
  FM_CHECK(group_size == 0 || group_size == 32 || group_size == 64 || group_size == 128,
           "group_size must be 0, 32, 64 or 128, got ", group_size);
  FM_CHECK(out_features >= 1 && out_features < int64_t{1} << 31, "out_features must be from 1 to 2^31 - 1, got ",
           out_features);
  FM_CHECK(in_features >= 1 && in_features < int64_t{1} << 31, "in_features must be from 1 to 2^31 - 1, got ",
           in_features);
  FM_CHECK(!zeros.has_value() || bits == 4, "zeros are of bits = 4 alone");
  PackedWeight w{};
  w.bits = static_cast<int>(bits);
  w.out_features = out_features;
  w.in_features = in_features;
  w.num_chunks = (in_features + kPackedChunk - 1) / kPackedChunk;
  w.chunks_per_group = group_size == 0 ? w.num_chunks : group_size / kPackedChunk;
  w.num_groups = (w.num_chunks + w.chunks_per_group - 1) / w.chunks_per_group;
  auto check = [&](const char* name, const Tensor& t, ScalarType type, const char* type_name, int64_t per_row) {
    check_scalar_type(name, t, type, type_name);
    check_same_device(name, t, values);
    check_rank(name, t, 3);
    check_size(name, t, 0, w.num_panels());
    check_size(name, t, 1, per_row);
    check_size(name, t, 2, kPackedPanel);
    FM_CHECK(t.is_contiguous(), name, " must be contiguous");
    const void* data = data_of(t);
    FM_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0 || t.element_size() == 1, name,
             " must begin on a 16-byte boundary");
    return data;
  };
  w.values = static_cast<const uint32_t*>(
      check("values", values, ScalarType::Int, "int32", w.num_chunks * (w.words_per_chunk() / kPackedPanel)));
  w.scales = static_cast<const float*>(check("scales", scales, ScalarType::Float, "float32", w.num_groups));
  if (zeros.has_value()) {
    w.zeros = static_cast<const uint8_t*>(check("zeros", *zeros, ScalarType::Byte, "uint8", w.num_groups));
    FM_CHECK(reinterpret_cast<uintptr_t>(w.zeros) % 4 == 0, "zeros must begin on a 4-byte boundary");
  }
  return w;
}

}  // namespace fmkernels
