// SPDX-License-Identifier: Apache-2.0
// See matrix.h. Fragments are expanded into small dense matrices; a row of the result is one vector of 8 columns.
#include "numerics.h"

#include "matrix.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <map>
#include <utility>

#ifdef __FMA__
#include <immintrin.h>
#endif

namespace emulator {

namespace {

using numerics::kLanes;

// The columns of a row stand in the order 0 2 4 6 1 3 5 7: then a row of C is four lanes of one register and four of
// the next, without a shuffle, and transposing B is two rounds of unpacking.
using Row = float __attribute__((vector_size(32)));
using IntRow = int32_t __attribute__((vector_size(32)));
using Word8 = uint32_t __attribute__((vector_size(32)));
using Word4 = uint32_t __attribute__((vector_size(16)));
using Half8 = uint16_t __attribute__((vector_size(16)));
constexpr int column_position(int n) { return (n % 2) * 4 + n / 2; }

template <class V>
V load(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
template <class V>
void store(void* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

inline Row multiply_add(float a, Row b, Row c) {
#ifdef __FMA__
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#else
  for (int n = 0; n < 8; ++n) c[n] = std::fma(a, b[n], c[n]);
  return c;
#endif
}

// ---- elements -------------------------------------------------------------------------------------------------------

enum class Element { kF16, kBf16, kTf32, kE4m3, kE5m2, kS8, kU8, kS4, kU4 };

constexpr int per_word(Element e) {
  switch (e) {
    case Element::kTf32: return 1;
    case Element::kF16:
    case Element::kBf16: return 2;
    case Element::kS4:
    case Element::kU4: return 8;
    default: return 4;
  }
}
constexpr bool is_integer(Element e) { return e >= Element::kS8; }

std::array<float, 256> make_fp8_table(const numerics::Format& format) {
  std::array<float, 256> table;
  for (uint32_t i = 0; i < 256; ++i) {
    table[i] = numerics::as_float(static_cast<uint32_t>(numerics::convert(numerics::kF32, format, i, {})));
  }
  return table;
}
const std::array<float, 256> kE4m3Floats = make_fp8_table(numerics::kE4m3);
const std::array<float, 256> kE5m2Floats = make_fp8_table(numerics::kE5m2);

// Eight halves, each in the low half of a word, as floats. NaN stays some NaN: results are made canonical at the end.
inline Row floats_of_halves(Word8 halves) {
  const Word8 magnitude = (halves & 0x7fff) << 13;
  const Word8 finite = reinterpret_cast<Word8>(reinterpret_cast<Row>(magnitude) * 0x1p112f);
  const Word8 special = reinterpret_cast<Word8>(reinterpret_cast<IntRow>(magnitude) >= 0x0f800000) & 0x7f800000;
  return reinterpret_cast<Row>(finite | special | (halves & 0x8000) << 16);
}

// Four registers' words, which are neighbours in k, to 4 * per_word(E) numbers.
template <Element E, class Number>
inline void expand(const uint32_t* words, Number* out) {
  if constexpr (E == Element::kF16) {
    store(out, floats_of_halves(__builtin_convertvector(load<Half8>(words), Word8)));
  } else if constexpr (E == Element::kBf16) {
    store(out, __builtin_convertvector(load<Half8>(words), Word8) << 16);
  } else if constexpr (E == Element::kTf32) {
    store(out, load<Word4>(words) & 0xffffe000);
  } else {
    uint8_t bytes[16];
    std::memcpy(bytes, words, sizeof bytes);
    for (int i = 0; i < 16; ++i) {
      if constexpr (E == Element::kE4m3) out[i] = kE4m3Floats[bytes[i]];
      if constexpr (E == Element::kE5m2) out[i] = kE5m2Floats[bytes[i]];
      if constexpr (E == Element::kS8) out[i] = static_cast<int8_t>(bytes[i]);
      if constexpr (E == Element::kU8) out[i] = bytes[i];
      if constexpr (E == Element::kU4) {
        out[2 * i] = bytes[i] & 15;
        out[2 * i + 1] = bytes[i] >> 4;
      }
      if constexpr (E == Element::kS4) {
        out[2 * i] = ((bytes[i] & 15) ^ 8) - 8;
        out[2 * i + 1] = (bytes[i] >> 4 ^ 8) - 8;
      }
    }
  }
}

// A as dense rows of k numbers: the four lanes of a group hold neighbours in k.
template <Element E, class Number>
inline void expand_a(const void* const* a, int rows, int k, Number* dense) {
  constexpr int kStep = 4 * per_word(E);
  const int row_registers = rows / 8;
  for (int r = 0; r < row_registers * (k / kStep); ++r) {
    const auto* lanes = static_cast<const uint32_t*>(a[r]);
    Number* first = dense + r % row_registers * 8 * k + r / row_registers * kStep;
    for (int g = 0; g < 8; ++g) expand<E>(lanes + 4 * g, first + g * k);
  }
}

// B as k rows of 8 columns.
template <Element E, class Number>
inline void expand_b(const void* const* b, int k, Number (*dense)[8]) {
  constexpr int kStep = 4 * per_word(E);
  for (int r = 0; r < k / kStep; ++r) {
    const auto* lanes = static_cast<const uint32_t*>(b[r]);
    if constexpr (per_word(E) == 2) {
      const Word8 y0 = load<Word8>(lanes), y1 = load<Word8>(lanes + 8);
      const Word8 y2 = load<Word8>(lanes + 16), y3 = load<Word8>(lanes + 24);  // [column 2 i, column 2 i + 1][t]
      const Word8 u0 = __builtin_shufflevector(y0, y1, 0, 8, 1, 9, 4, 12, 5, 13);
      const Word8 u1 = __builtin_shufflevector(y0, y1, 2, 10, 3, 11, 6, 14, 7, 15);
      const Word8 u2 = __builtin_shufflevector(y2, y3, 0, 8, 1, 9, 4, 12, 5, 13);
      const Word8 u3 = __builtin_shufflevector(y2, y3, 2, 10, 3, 11, 6, 14, 7, 15);
      const Word8 pairs[4] = {__builtin_shufflevector(u0, u2, 0, 1, 8, 9, 4, 5, 12, 13),
                              __builtin_shufflevector(u0, u2, 2, 3, 10, 11, 6, 7, 14, 15),
                              __builtin_shufflevector(u1, u3, 0, 1, 8, 9, 4, 5, 12, 13),
                              __builtin_shufflevector(u1, u3, 2, 3, 10, 11, 6, 7, 14, 15)};  // [t][column]
      for (int t = 0; t < 4; ++t) {
        auto* two_rows = &dense[kStep * r + 2 * t];
        if constexpr (E == Element::kBf16) {
          store(two_rows[0], pairs[t] << 16);
          store(two_rows[1], pairs[t] & 0xffff0000);
        } else {
          store(two_rows[0], floats_of_halves(pairs[t] & 0xffff));
          store(two_rows[1], floats_of_halves(pairs[t] >> 16));
        }
      }
    } else {
      for (int g = 0; g < 8; ++g) {
        Number column[kStep];
        expand<E>(lanes + 4 * g, column);
        for (int i = 0; i < kStep; ++i) dense[kStep * r + i][column_position(g)] = column[i];
      }
    }
  }
}

// The same as functions, for the forms that are rare.
template <Element E, class Number>
__attribute__((noinline)) void expand_any_a(const void* const* a, int rows, int k, Number* dense) {
  expand_a<E>(a, rows, k, dense);
}
template <Element E, class Number>
__attribute__((noinline)) void expand_any_b(const void* const* b, int k, Number (*dense)[8]) {
  expand_b<E>(b, k, dense);
}

// ---- accumulators ---------------------------------------------------------------------------------------------------

template <bool kHalf>
inline Row load_row(const void* const* c, int row) {
  const int first_lane = 4 * (row % 8), upper = row / 8;
  if constexpr (kHalf) {
    const auto words = load<Word4>(static_cast<const uint32_t*>(c[upper]) + first_lane);
    return floats_of_halves(__builtin_shufflevector(words & 0xffff, words >> 16, 0, 1, 2, 3, 4, 5, 6, 7));
  } else {
    const auto even = load<Word4>(static_cast<const uint32_t*>(c[2 * upper]) + first_lane);
    const auto odd = load<Word4>(static_cast<const uint32_t*>(c[2 * upper + 1]) + first_lane);
    return reinterpret_cast<Row>(__builtin_shufflevector(even, odd, 0, 1, 2, 3, 4, 5, 6, 7));
  }
}
template <bool kHalf>
inline void store_row(void* const* d, int row, Row value) {
  const int first_lane = 4 * (row % 8), upper = row / 8;
  if constexpr (kHalf) {
    auto* lanes = static_cast<uint32_t*>(d[upper]) + first_lane;
    for (int t = 0; t < 4; ++t) {
      lanes[t] = numerics::f16_from_float(value[t]) | numerics::f16_from_float(value[4 + t]) << 16;
    }
  } else {
    const Word8 number = reinterpret_cast<Word8>(value == value);
    const Word8 bits = (reinterpret_cast<Word8>(value) & number) | (~number & 0x7fffffff);
    store(static_cast<uint32_t*>(d[2 * upper]) + first_lane, __builtin_shufflevector(bits, bits, 0, 1, 2, 3));
    store(static_cast<uint32_t*>(d[2 * upper + 1]) + first_lane, __builtin_shufflevector(bits, bits, 4, 5, 6, 7));
  }
}

// ---- sparse A -------------------------------------------------------------------------------------------------------

// Metadata: a 2-bit index says where in its chunk of four a nonzero stands. 16- and 8-bit elements: one index each.
// tf32 (one of two): two indices each, 0b0100 the first, 0b1110 the second of the chunk. 4-bit elements: one index a
// pair. The bits of a row ascend with k, in words of the lanes of group g = row % 8; s is the selector:
//   16 bits a row                              lane 4g + s, low half for row g, high half for row g + 8
//   32 bits, 16-bit elements and tf32          lanes 4g + 2s (first half of k) and 4g + 2s + 1, halves as above
//   32 bits, 8- and 4-bit elements             lane 4g + 2s for row g, lane 4g + 2s + 1 for row g + 8
//   64 bits                                    lanes 4g and 4g + 2 for row g, lanes 4g + 1 and 4g + 3 for row g + 8
constexpr int metadata_bits_of_row(Element e, int k) {
  return e == Element::kTf32 ? 2 * k : per_word(e) == 8 ? k / 2 : k;
}
constexpr int num_selectors(Element e, int k) { return 64 / metadata_bits_of_row(e, k); }

// Where the k / 2 nonzeros of each row stand.
void expand_metadata(Element e, int k, const uint32_t* metadata, int selector, uint8_t* position) {
  const int bits_of_row = metadata_bits_of_row(e, k);
  for (int row = 0; row < 16; ++row, position += k / 2) {
    const uint32_t* group = metadata + 4 * (row % 8);
    const int upper = row / 8;
    const auto half = [&](int lane) { return uint64_t{group[lane]} >> (16 * upper) & 0xffff; };
    uint64_t bits;
    if (bits_of_row == 16) {
      bits = half(selector);
    } else if (bits_of_row == 32 && per_word(e) <= 2) {
      bits = half(2 * selector) | half(2 * selector + 1) << 16;
    } else if (bits_of_row == 32) {
      bits = group[2 * selector + upper];
    } else {
      bits = group[upper] | uint64_t{group[2 + upper]} << 32;
    }
    for (int j = 0; j < k / 2; ++j) {
      uint64_t at;
      if (e == Element::kTf32) {
        at = static_cast<uint64_t>(2 * j) + (bits >> (4 * j + 1) & 1);
      } else if (per_word(e) == 8) {
        at = static_cast<uint64_t>(j / 4 * 8 + j % 2) + 2 * (bits >> (j / 2 * 2) & 3);
      } else {
        at = static_cast<uint64_t>(j / 2 * 4) + (bits >> (2 * j) & 3);
      }
      position[j] = static_cast<uint8_t>(at);
    }
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

constexpr int kMaxK = 128;  // of a sparse product of 4-bit elements; no more than 64 are multiplied for one sum

// The forms of f16, bf16 and tf32: everything is unrolled.
template <Element E, int kK, bool kHalf>
void run_float(void* const* d, const void* const* a, const void* const* b, const void* const* c, const uint32_t*, int) {
  alignas(32) float dense_a[16][kK];
  alignas(32) float dense_b[kK][8];
  expand_a<E>(a, 16, kK, &dense_a[0][0]);
  expand_b<E>(b, kK, dense_b);
  for (int first = 0; first < 16; first += 8) {
    Row sum[8];
    for (int m = 0; m < 8; ++m) sum[m] = load_row<kHalf>(c, first + m);
    for (int k = 0; k < kK; ++k) {
      const Row row = load<Row>(dense_b[k]);
      for (int m = 0; m < 8; ++m) sum[m] = multiply_add(dense_a[first + m][k], row, sum[m]);
    }
    for (int m = 0; m < 8; ++m) store_row<kHalf>(d, first + m, sum[m]);
  }
}

// a [16][num_terms]; of sparse products `position` says which row of b a term belongs to. What the metadata leave out
// is not multiplied: zero times infinity would be NaN.
template <bool kHalf>
__attribute__((noinline)) void multiply_floats(void* const* d, const void* const* c, const float* a, int num_terms,
                                               const float (*b)[8], const uint8_t* position) {
  Row result[16];
  for (int first = 0; first < 16; first += 4) {  // four chains of sums at a time, which hide their latency
    Row sum[4];
    for (int m = 0; m < 4; ++m) sum[m] = load_row<kHalf>(c, first + m);
    const float* factors = a + first * num_terms;
    if (position == nullptr) {
      for (int j = 0; j < num_terms; ++j) {
        const Row row = load<Row>(b[j]);
        for (int m = 0; m < 4; ++m) sum[m] = multiply_add(factors[m * num_terms + j], row, sum[m]);
      }
    } else {
      const uint8_t* rows = position + first * num_terms;
      for (int j = 0; j < num_terms; ++j) {
        for (int m = 0; m < 4; ++m) {
          sum[m] = multiply_add(factors[m * num_terms + j], load<Row>(b[rows[m * num_terms + j]]), sum[m]);
        }
      }
    }
    for (int m = 0; m < 4; ++m) result[first + m] = sum[m];
  }
  for (int m = 0; m < 16; ++m) store_row<kHalf>(d, m, result[m]);
}

template <Element A, Element B, int kK, bool kHalf>
void run_any_float(void* const* d, const void* const* a, const void* const* b, const void* const* c, const uint32_t*,
                   int) {
  alignas(32) float dense_a[16 * kMaxK / 4];
  alignas(32) float dense_b[kMaxK / 4][8];
  expand_any_a<A>(a, 16, kK, dense_a);
  expand_any_b<B>(b, kK, dense_b);
  multiply_floats<kHalf>(d, c, dense_a, kK, dense_b, nullptr);
}
template <Element A, Element B, int kK, bool kHalf>
void run_sparse_float(void* const* d, const void* const* a, const void* const* b, const void* const* c,
                      const uint32_t* metadata, int selector) {
  alignas(32) float nonzeros[16 * kMaxK / 4];
  alignas(32) float dense_b[kMaxK / 2][8];
  uint8_t position[16 * kMaxK / 4];
  expand_any_a<A>(a, 16, kK / 2, nonzeros);
  expand_any_b<B>(b, kK, dense_b);
  expand_metadata(A, kK, metadata, selector, position);
  multiply_floats<kHalf>(d, c, nonzeros, kK / 2, dense_b, position);
}

inline int32_t add_to(int32_t c, int32_t product, bool clamp) {
  if (!clamp) return static_cast<int32_t>(static_cast<uint32_t>(c) + static_cast<uint32_t>(product));
  const int64_t sum = static_cast<int64_t>(c) + product;
  return static_cast<int32_t>(sum > INT32_MAX ? INT32_MAX : sum < INT32_MIN ? INT32_MIN : sum);
}

// products [rows][column_position] is added to c. Sums of products stay far below 2^31.
void add_products(void* const* d, const void* const* c, const IntRow* products, int rows, bool clamp) {
  int32_t result[16][8];
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < 8; ++n) {
      const int32_t old = static_cast<const int32_t*>(c[m / 8 * 2 + n % 2])[4 * (m % 8) + n / 2];
      result[m][n] = add_to(old, products[m][column_position(n)], clamp);
    }
  }
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < 8; ++n) static_cast<int32_t*>(d[m / 8 * 2 + n % 2])[4 * (m % 8) + n / 2] = result[m][n];
  }
}

__attribute__((noinline)) void multiply_integers(void* const* d, const void* const* c, const int32_t* a, int rows,
                                                 int num_terms, const int32_t (*b)[8], const uint8_t* position,
                                                 bool clamp) {
  IntRow products[16];
  for (int first = 0; first < rows; first += 4) {
    IntRow sum[4] = {};
    const int32_t* factors = a + first * num_terms;
    const uint8_t* positions = position + (position != nullptr ? first * num_terms : 0);
    for (int j = 0; j < num_terms; ++j) {
      for (int m = 0; m < 4; ++m) {
        const int at = m * num_terms + j;
        sum[m] += factors[at] * load<IntRow>(b[position != nullptr ? positions[at] : j]);
      }
    }
    for (int m = 0; m < 4; ++m) products[first + m] = sum[m];
  }
  add_products(d, c, products, rows, clamp);
}

template <Element A, Element B, int kRows, int kK, bool kClamp>
void run_integer(void* const* d, const void* const* a, const void* const* b, const void* const* c, const uint32_t*,
                 int) {
  alignas(32) int32_t dense_a[16 * kMaxK / 2];
  alignas(32) int32_t dense_b[kMaxK / 2][8];
  expand_any_a<A>(a, kRows, kK, dense_a);
  expand_any_b<B>(b, kK, dense_b);
  multiply_integers(d, c, dense_a, kRows, kK, dense_b, nullptr, kClamp);
}

template <Element A, Element B, int kK, bool kClamp>
void run_sparse_integer(void* const* d, const void* const* a, const void* const* b, const void* const* c,
                        const uint32_t* metadata, int selector) {
  alignas(32) int32_t nonzeros[16 * kMaxK / 2];
  alignas(32) int32_t dense_b[kMaxK][8];
  uint8_t position[16 * kMaxK / 2];
  expand_any_a<A>(a, 16, kK / 2, nonzeros);
  expand_any_b<B>(b, kK, dense_b);
  expand_metadata(A, kK, metadata, selector, position);
  multiply_integers(d, c, nonzeros, 16, kK / 2, dense_b, position, kClamp);
}

template <int kRows, int kK, bool kXor>
void run_bits(void* const* d, const void* const* a, const void* const* b, const void* const* c, const uint32_t*, int) {
  IntRow sum[kRows] = {};
  constexpr int kRowRegisters = kRows / 8;
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < 8; ++n) {
      for (int word = 0; word < kK / 32; ++word) {
        const uint32_t x = static_cast<const uint32_t*>(a[word / 4 * kRowRegisters + m / 8])[4 * (m % 8) + word % 4];
        const uint32_t y = static_cast<const uint32_t*>(b[word / 4])[4 * n + word % 4];
        sum[m][column_position(n)] += std::popcount(kXor ? x ^ y : x & y);
      }
    }
  }
  add_products(d, c, sum, kRows, false);
}

template <int kRows, int kK>
void run_double(void* const* d, const void* const* a, const void* const* b, const void* const* c, const uint32_t*,
                int) {
  double dense_b[kK][8], sum[kRows][8];
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < 8; ++n) dense_b[k][n] = static_cast<const double*>(b[k / 4])[4 * n + k % 4];
  }
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < 8; ++n) sum[m][n] = static_cast<const double*>(c[m / 8 * 2 + n % 2])[4 * (m % 8) + n / 2];
    for (int k = 0; k < kK; ++k) {
      const double x = static_cast<const double*>(a[k / 4 * (kRows / 8) + m / 8])[4 * (m % 8) + k % 4];
      for (int n = 0; n < 8; ++n) sum[m][n] = std::fma(x, dense_b[k][n], sum[m][n]);
    }
    for (int n = 0; n < 8; ++n) sum[m][n] = numerics::canonical(sum[m][n]);
  }
  for (int m = 0; m < kRows; ++m) {
    for (int n = 0; n < 8; ++n) static_cast<double*>(d[m / 8 * 2 + n % 2])[4 * (m % 8) + n / 2] = sum[m][n];
  }
}

// ---- the table ------------------------------------------------------------------------------------------------------

using Table = std::map<std::string, MatrixOp>;

constexpr uint64_t flops_of(int m, int k) {
  return uint64_t{2} * static_cast<uint64_t>(m) * 8 * static_cast<uint64_t>(k);
}

const char* name_of(Element e) {
  constexpr const char* kNames[] = {"f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8", "s4", "u4"};
  return kNames[static_cast<int>(e)];
}

std::string key_of(bool sparse, int m, int k, const char* modifier, const std::string& d, const char* a, const char* b,
                   const std::string& c, const char* behind = "") {
  return std::string(sparse ? "sp." : "") + "sync.aligned.m" + std::to_string(m) + "n8k" + std::to_string(k) +
         ".row.col" + modifier + "." + d + "." + a + "." + b + "." + c + behind;
}

template <Element A, Element B, int kK, bool kHalf>
void add_float(Table& table) {
  const std::string accumulator = kHalf ? "f16" : "f32";
  constexpr int kAccumulators = kHalf ? 2 : 4, kWordsB = kK / (4 * per_word(A));
  MatrixOp dense{kAccumulators, 2 * kWordsB, kWordsB, kAccumulators, 0, 0, flops_of(16, kK), 4, nullptr};
  if constexpr (per_word(A) < 4) {
    dense.run = run_float<A, kK, kHalf>;
  } else {
    dense.run = run_any_float<A, B, kK, kHalf>;
  }
  table[key_of(false, 16, kK, "", accumulator, name_of(A), name_of(B), accumulator)] = dense;

  constexpr int kSparseK = 2 * kK;  // the same registers of A
  if constexpr (per_word(A) < 4 || kK == 32) {
    table[key_of(true, 16, kSparseK, "", accumulator, name_of(A), name_of(B), accumulator)] =
        MatrixOp{kAccumulators,          2 * kWordsB, 2 * kWordsB,
                 kAccumulators,          1,           num_selectors(A, kSparseK),
                 flops_of(16, kSparseK), 4,           run_sparse_float<A, B, kSparseK, kHalf>};
  }
}

template <Element A, Element B, bool kClamp>
void add_integer(Table& table) {
  constexpr int kStep = 4 * per_word(A);
  const char* modifier = kClamp ? ".satfinite" : "";
  const auto key = [&](bool sparse, int m, int k) {
    return key_of(sparse, m, k, modifier, "s32", name_of(A), name_of(B), "s32");
  };
  table[key(false, 8, kStep)] = MatrixOp{2, 1, 1, 2, 0, 0, flops_of(8, kStep), 4, run_integer<A, B, 8, kStep, kClamp>};
  table[key(false, 16, kStep)] =
      MatrixOp{4, 2, 1, 4, 0, 0, flops_of(16, kStep), 4, run_integer<A, B, 16, kStep, kClamp>};
  table[key(false, 16, 2 * kStep)] =
      MatrixOp{4, 4, 2, 4, 0, 0, flops_of(16, 2 * kStep), 4, run_integer<A, B, 16, 2 * kStep, kClamp>};
  table[key(true, 16, 2 * kStep)] = MatrixOp{4,
                                             2,
                                             2,
                                             4,
                                             1,
                                             num_selectors(A, 2 * kStep),
                                             flops_of(16, 2 * kStep),
                                             4,
                                             run_sparse_integer<A, B, 2 * kStep, kClamp>};
  table[key(true, 16, 4 * kStep)] = MatrixOp{4,
                                             4,
                                             4,
                                             4,
                                             1,
                                             num_selectors(A, 4 * kStep),
                                             flops_of(16, 4 * kStep),
                                             4,
                                             run_sparse_integer<A, B, 4 * kStep, kClamp>};
}

template <Element A, Element B>
void add_fp8(Table& table) {
  add_float<A, B, 16, false>(table);
  add_float<A, B, 16, true>(table);
  add_float<A, B, 32, false>(table);
  add_float<A, B, 32, true>(table);
}

template <Element A, Element B>
void add_integers(Table& table) {
  add_integer<A, B, false>(table);
  add_integer<A, B, true>(table);
}

template <int kRows, int kK>
void add_bits(Table& table) {
  constexpr int kWordsB = kK / 128, kAccumulators = kRows / 4;
  const auto op = [](auto* run) {
    return MatrixOp{kAccumulators, kRows / 8 * kWordsB, kWordsB, kAccumulators, 0, 0, flops_of(kRows, kK), 4, run};
  };
  table[key_of(false, kRows, kK, "", "s32", "b1", "b1", "s32", ".xor.popc")] = op(run_bits<kRows, kK, true>);
  table[key_of(false, kRows, kK, "", "s32", "b1", "b1", "s32", ".and.popc")] = op(run_bits<kRows, kK, false>);
}

template <int kRows, int kK>
void add_double(Table& table) {
  constexpr int kAccumulators = kRows / 4;
  table[key_of(false, kRows, kK, "", "f64", "f64", "f64", "f64")] = MatrixOp{
      kAccumulators, kRows / 8 * (kK / 4), kK / 4, kAccumulators, 0, 0, flops_of(kRows, kK), 8, run_double<kRows, kK>};
}

Table make_table() {
  using enum Element;
  Table table;
  add_float<kF16, kF16, 8, false>(table);
  add_float<kF16, kF16, 8, true>(table);
  add_float<kF16, kF16, 16, false>(table);
  add_float<kF16, kF16, 16, true>(table);
  add_float<kBf16, kBf16, 8, false>(table);
  add_float<kBf16, kBf16, 16, false>(table);
  add_float<kTf32, kTf32, 4, false>(table);
  add_float<kTf32, kTf32, 8, false>(table);
  add_fp8<kE4m3, kE4m3>(table);
  add_fp8<kE4m3, kE5m2>(table);
  add_fp8<kE5m2, kE4m3>(table);
  add_fp8<kE5m2, kE5m2>(table);
  add_integers<kS8, kS8>(table);
  add_integers<kS8, kU8>(table);
  add_integers<kU8, kS8>(table);
  add_integers<kU8, kU8>(table);
  add_integers<kS4, kS4>(table);
  add_integers<kS4, kU4>(table);
  add_integers<kU4, kS4>(table);
  add_integers<kU4, kU4>(table);
  add_bits<8, 128>(table);
  add_bits<16, 128>(table);
  add_bits<16, 256>(table);
  add_double<8, 4>(table);
  add_double<16, 4>(table);
  add_double<16, 8>(table);
  add_double<16, 16>(table);
  return table;
}

}  // namespace

const MatrixOp* find_matrix_op(const std::vector<std::string>& parts) {
  static const Table table = make_table();
  // .satfinite stands behind .col or at the end.
  const bool clamps = !parts.empty() && parts.back() == "satfinite";
  std::string key;
  for (const std::string& part : parts) {
    if (clamps && &part == &parts.back()) break;
    if (!key.empty()) key += '.';
    key += part == "sp::ordered_metadata" ? "sp" : part;
    if (clamps && part == "col") key += ".satfinite";
  }
  const auto found = table.find(key);
  return found == table.end() ? nullptr : &found->second;
}

// ---- moving 8 x 8 matrices ------------------------------------------------------------------------------------------

void ldmatrix(const uint8_t* const rows[8], bool transpose, uint32_t* lanes) {
  uint32_t words[kLanes];
  for (int g = 0; g < 8; ++g) std::memcpy(words + 4 * g, rows[g], 16);
  if (transpose) {
    movmatrix_trans(words, lanes);
  } else {
    std::memcpy(lanes, words, sizeof words);
  }
}

void stmatrix(uint8_t* const rows[8], bool transpose, const uint32_t* lanes) {
  uint32_t words[kLanes];
  if (transpose) {
    movmatrix_trans(lanes, words);
  } else {
    std::memcpy(words, lanes, sizeof words);
  }
  for (int g = 0; g < 8; ++g) std::memcpy(rows[g], words + 4 * g, 16);
}

void movmatrix_trans(const uint32_t* in, uint32_t* out) {
  uint16_t elements[8][8], transposed[8][8];
  std::memcpy(elements, in, sizeof elements);
  for (int row = 0; row < 8; ++row) {
    for (int column = 0; column < 8; ++column) transposed[column][row] = elements[row][column];
  }
  std::memcpy(out, transposed, sizeof transposed);
}

}  // namespace emulator
