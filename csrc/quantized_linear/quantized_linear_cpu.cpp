// SPDX-License-Identifier: Apache-2.0
// quantized_linear_cpu.cpp: the CPU kernels: a panel of 32 output features, whose words are one stream of memory, is a task.
//
// Contract   see quantized_linear.h. x is first copied to float32, [chunk][row][kPackedChunk], padded with zeros.
// Work       common/packed_weight_cpu.h, where its numerics and its cost are.

#include "quantized_linear.h"

#include "../common/packed_weight_cpu.h"
#include "../common/parallel.h"

namespace fmkernels {
namespace {

constexpr int kRowsOfX = 480;  // rows of x that are copied at a time

template <class T>
const T* row_of_x(const QuantizedLinearParams& p, int64_t row) {
  return static_cast<const T*>(p.x) + row / p.rows_per_batch * p.x_stride[0] + row % p.rows_per_batch * p.x_stride[1];
}

// ---- The product --------------------------------------------------------------------------------------------------------------

// y[row][the panel's features] = total * factor + bias.
template <class T>
void write_row(const QuantizedLinearParams& p, int64_t panel, int64_t row, const float* total, float factor) {
  const int64_t first = panel * kPackedPanel, n = p.weight.out_features;
  T* y = static_cast<T*>(p.y) + row * n + first;
  const int count = static_cast<int>(n - first < kPackedPanel ? n - first : kPackedPanel);
  for (int i = 0; i < count; ++i) {
    const float sum = total[i] * factor;
    y[i] = from_float<T>(p.bias == nullptr ? sum : sum + bias_of(p, first + i));
  }
}

template <class T, int kBits>
void quantized_linear(const QuantizedLinearParams& p) {
  const PackedWeight& w = p.weight;
  const int64_t block_rows = p.num_rows < kRowsOfX ? p.num_rows : kRowsOfX;
  const int64_t x_floats = block_rows * w.num_chunks * kPackedChunk;
  const Workspace workspace(Arena::array_bytes<float>(x_floats) + Arena::array_bytes<float>(block_rows));
  Arena arena(workspace.data());
  float *x = arena.take<float>(x_floats), *factors = arena.take<float>(block_rows);
  for (int64_t begin = 0; begin < p.num_rows; begin += block_rows) {
    const int64_t count = p.num_rows - begin < block_rows ? p.num_rows - begin : block_rows;
    const int workers = workers_for(count * w.out_features * w.in_features);
    parallel_for(count, count >= 64 ? workers : 1, [&](int64_t row, int) {
      factors[row] = copy_row<T, kBits>(row_of_x<T>(p, begin + row), w.in_features, w.num_chunks,
                                        x + row * kPackedChunk, count * kPackedChunk);
    });
    parallel_for(w.num_panels(), workers, [&](int64_t panel, int) {
      alignas(64) float total[kRowBlock * kPackedPanel];
      for (int64_t first = 0; first < count; first += kRowBlock) {
        const int rows = static_cast<int>(count - first < kRowBlock ? count - first : kRowBlock);
        multiply_rows<kBits>(w, panel, x + first * kPackedChunk, count, rows, total);
        for (int row = 0; row < rows; ++row) {
          write_row<T>(p, panel, begin + first + row, total + row * kPackedPanel, factors[first + row]);
        }
      }
    });
  }
}

// ---- The weight as numbers ---------------------------------------------------------------------------------------------

template <class T, int kBits>
void dequantize(const DequantizeParams& p) {
  using D = Decoder<kBits>;
  const PackedWeight& w = p.weight;
  parallel_for(w.num_panels(), workers_for(w.out_features * w.in_features), [&](int64_t index, int) {
    alignas(64) float tile[kPackedChunk * kPackedPanel];
    PanelWalk<kBits> panel{w, index, {}};
    for (int64_t chunk = 0; chunk < w.num_chunks; ++chunk) {
      panel.step();
      decode_chunk(panel, chunk, tile);
      for (int64_t row = 0; row < kPackedPanel && index * kPackedPanel + row < w.out_features; ++row) {
        T* to = static_cast<T*>(p.w) + (index * kPackedPanel + row) * w.in_features;
        for (int i = 0; i < kPackedChunk; ++i) {
          const int64_t column = chunk * kPackedChunk + i / D::kColumns * D::kColumns + D::column(i % D::kColumns);
          const float integer = tile[i * kPackedPanel + row] / static_cast<float>(1 << D::shift_of_column(column % 8));
          if (column < w.in_features) to[column] = from_float<T>(integer * panel.scales()[row]);
        }
      }
    }
  });
}

}  // namespace

template <>
void run_quantized_linear<kIsa>(const QuantizedLinearParams& p) {
  dispatch_packed(p.dtype, p.weight.bits, [&]<class T, int kBits>() { quantized_linear<T, kBits>(p); });
}

template <>
void run_quantized_linear_dequantize<kIsa>(const DequantizeParams& p) {
  dispatch_packed(p.dtype, p.weight.bits, [&]<class T, int kBits>() { dequantize<T, kBits>(p); });
}

}  // namespace fmkernels
