// SPDX-License-Identifier: Apache-2.0
// rope_forward, rope_forward_out: tensors in, checks, Params out.
#include "../common/tensor.h"
#include "rope.h"

namespace fmkernels {
namespace {

// [batch, tokens, heads, head_dim] or [tokens, heads, head_dim], like q but for the number of heads.
void check_like(const char* name, const Tensor& t, const Tensor& q) {
  check_rank(name, t, q.dim());
  check_last_dim_contiguous(name, t);
  check_same_device(name, t, q);
  FM_CHECK(t.scalar_type() == q.scalar_type(), name, " must have the dtype of q");
  for (int64_t dim = 0; dim < q.dim(); ++dim) {
    if (dim != q.dim() - 2) check_size(name, t, dim, q.size(dim));
  }
}

RopeSide view_side(const char* name, const Tensor& in, const char* out_name, const Tensor& out, const Tensor& q) {
  check_like(name, in, q);
  check_like(out_name, out, q);
  const int64_t first = q.dim() - 3;
  check_size(out_name, out, first + 1, in.size(first + 1));
  RopeSide side{in.size(first + 1), data_of(in), data_of(out), {}, {}};
  const auto strides = [&](const Tensor& t, int64_t (&to)[3]) {
    to[0] = first == 0 ? 0 : stride_of(t, 0);
    to[1] = stride_of(t, first);
    to[2] = stride_of(t, first + 1);
  };
  strides(in, side.in_stride);
  strides(out, side.out_stride);
  return side;
}

// Whether rotating writes over what it reads, so that the columns beyond rotary_dim already stand in place.
bool is_in_place(const RopeSide& side) {
  bool same = side.in == side.out;
  for (int dim = 0; dim < 3; ++dim) same = same && side.in_stride[dim] == side.out_stride[dim];
  return same;
}

// The CPU's own kernel sees positions anyway; the others clamp them, and Python looks at them when it is told to.
void check_positions([[maybe_unused]] const RopeParams& p) {
#ifndef FM_CUDA
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t token = 0; token < p.num_tokens; ++token) {
      const int64_t position = position_of(p, batch, token);
      FM_CHECK(position >= 0 && position < p.num_positions, "positions must be in [0, ", p.num_positions, "), got ",
               position);
    }
  }
#endif
}

void execute(const Tensor& q, const std::optional<Tensor>& k, const Tensor& positions, const Tensor& cos_sin,
             bool interleaved, bool inverse, const Tensor& q_out, const Tensor* k_out) {
  FM_CHECK(q.dim() == 3 || q.dim() == 4, "q must have 3 or 4 dimensions, got ", q.dim());
  FM_CHECK(k.has_value() == (k_out != nullptr), "k and its output must be given together");
  const int64_t first = q.dim() - 3;
  RopeParams p{};
  p.dtype = dtype_of("q", q);
  p.batch = first == 0 ? 1 : q.size(0);
  p.num_tokens = q.size(first);
  p.head_dim = q.size(first + 2);
  p.interleaved = interleaved;
  p.inverse = inverse;
  p.q = view_side("q", q, "q_out", q_out, q);
  if (k.has_value()) p.k = view_side("k", *k, "k_out", *k_out, q);

  p.copies_rest = !is_in_place(p.q) || !is_in_place(p.k);

  check_same_device("positions", positions, q);
  FM_CHECK(positions.dim() >= 1 && positions.dim() <= first + 1, "positions must have 1 to ", first + 1,
           " dimensions, got ", positions.dim());
  check_size("positions", positions, positions.dim() - 1, p.num_tokens);
  if (positions.dim() == 2) check_size("positions", positions, 0, p.batch);
  p.positions_are_int64 = positions.scalar_type() == ScalarType::Long;
  FM_CHECK(p.positions_are_int64 || positions.scalar_type() == ScalarType::Int, "positions must be int32 or int64");
  p.positions = data_of(positions);
  p.position_stride[0] = positions.dim() == 2 ? stride_of(positions, 0) : 0;
  p.position_stride[1] = stride_of(positions, positions.dim() - 1);

  check_rank("cos_sin", cos_sin, 2);
  check_same_device("cos_sin", cos_sin, q);
  check_last_dim_contiguous("cos_sin", cos_sin);
  p.cache_dtype = dtype_of("cos_sin", cos_sin);
  FM_CHECK(p.cache_dtype == DType::kFloat32 || p.cache_dtype == p.dtype,
           "cos_sin must be float32 or have the dtype of q");
  p.num_positions = cos_sin.size(0);
  p.rotary_dim = cos_sin.size(1);
  FM_CHECK(p.rotary_dim >= 2 && p.rotary_dim % 2 == 0 && p.rotary_dim <= p.head_dim,
           "cos_sin must have an even number of columns from 2 to head_dim, ", p.head_dim, ", got ", p.rotary_dim);
  p.cos_sin = data_of(cos_sin);
  p.cos_sin_stride = stride_of(cos_sin, 0);

  if (p.batch * p.num_tokens * (p.q.num_heads + p.k.num_heads) == 0) return;
  FM_CHECK(p.num_positions > 0, "cos_sin must have at least 1 row");
  check_positions(p);
  FM_EXECUTE(rope_forward, p, q);
}

std::tuple<Tensor, Tensor> rope_forward(const Tensor& q, const std::optional<Tensor>& k, const Tensor& positions,
                                        const Tensor& cos_sin, bool interleaved, bool inverse) {
  Tensor q_out = empty_contiguous(q);
  Tensor k_out = k.has_value() ? empty_contiguous(*k) : torch::stable::new_empty(q, {0});
  execute(q, k, positions, cos_sin, interleaved, inverse, q_out, k.has_value() ? &k_out : nullptr);
  return {q_out, k_out};
}

void rope_forward_out(const Tensor& q, const std::optional<Tensor>& k, const Tensor& positions, const Tensor& cos_sin,
                      bool interleaved, bool inverse, const Tensor& q_out, const std::optional<Tensor>& k_out) {
  check_written("q_out", q_out);
  if (k_out.has_value()) check_written("k_out", *k_out);
  execute(q, k, positions, cos_sin, interleaved, inverse, q_out, pointer_to(k_out));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fmkernels, FM_BACKEND, m) {
  m.impl("rope_forward", TORCH_BOX(&rope_forward));
  m.impl("rope_forward_out", TORCH_BOX(&rope_forward_out));
}

}  // namespace fmkernels
