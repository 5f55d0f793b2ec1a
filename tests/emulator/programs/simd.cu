// SPDX-License-Identifier: Apache-2.0
// The SIMD intrinsics of CUDA, two or four integers in a register, against their definition on single elements.
#include <algorithm>

#include "program.h"

constexpr int kNumbers = 4096;

// name, a, b signed, value of one element in 64 bits (kLow, kHigh: what an element of a's kind can hold).
#define ELEMENTWISE(F)                                 \
  F(vadd, false, a + b)                                \
  F(vsub, false, a - b)                                \
  F(vaddss, true, std::clamp(a + b, kLow, kHigh))      \
  F(vaddus, false, std::clamp(a + b, kLow, kHigh))     \
  F(vsubss, true, std::clamp(a - b, kLow, kHigh))      \
  F(vsubus, false, std::clamp(a - b, kLow, kHigh))     \
  F(vavgs, true, (a + b + (a + b >= 0)) >> 1)          \
  F(vavgu, false, (a + b + 1) >> 1)                    \
  F(vhaddu, false, (a + b) >> 1)                       \
  F(vabsdiffs, true, std::max(a, b) - std::min(a, b))  \
  F(vabsdiffu, false, std::max(a, b) - std::min(a, b)) \
  F(vmaxs, true, std::max(a, b))                       \
  F(vmaxu, false, std::max(a, b))                      \
  F(vmins, true, std::min(a, b))                       \
  F(vminu, false, std::min(a, b))                      \
  F(vcmpeq, false, a == b ? -1 : 0)                    \
  F(vcmpne, false, a != b ? -1 : 0)                    \
  F(vcmpgts, true, a > b ? -1 : 0)                     \
  F(vcmpgeu, false, a >= b ? -1 : 0)                   \
  F(vcmpltu, false, a < b ? -1 : 0)                    \
  F(vcmples, true, a <= b ? -1 : 0)                    \
  F(vseteq, false, a == b)                             \
  F(vsetgtu, false, a > b)                             \
  F(vsetlts, true, a < b)

// Of one operand.
#define UNARY(F)                                   \
  F(vabs, true, a < 0 ? -a : a)                    \
  F(vabsss, true, std::min(a < 0 ? -a : a, kHigh)) \
  F(vneg, true, -a)                                \
  F(vnegss, true, std::min(-a, kHigh))

// Sums of absolute differences.
#define SUMS(F) F(vsads, true) F(vsadu, false)

template <int kCount>
int64_t element(uint32_t x, int i, bool is_signed) {
  constexpr int kWidth = 32 / kCount;
  const int64_t bits = x >> (i * kWidth) & ((1u << kWidth) - 1);
  return is_signed && bits >> (kWidth - 1) ? bits - (int64_t{1} << kWidth) : bits;
}

template <int kCount, class F>
uint32_t of_elements(uint32_t x, uint32_t y, bool is_signed, F&& f) {
  constexpr int kWidth = 32 / kCount;
  const int64_t kLow = is_signed ? -(int64_t{1} << (kWidth - 1)) : 0;
  const int64_t kHigh = (int64_t{1} << (is_signed ? kWidth - 1 : kWidth)) - 1;
  uint32_t packed = 0;
  for (int i = 0; i < kCount; ++i) {
    const int64_t value = f(element<kCount>(x, i, is_signed), element<kCount>(y, i, is_signed), kLow, kHigh);
    packed |= (static_cast<uint32_t>(value) & ((1u << kWidth) - 1)) << (i * kWidth);
  }
  return packed;
}

template <class F>
__global__ void apply(const uint32_t* x, const uint32_t* y, uint32_t* out, F f) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = f(x[i], y[i]);
}

template <class F, class Host>
void compare(const std::vector<uint32_t>& x, const std::vector<uint32_t>& y, F device, Host&& host, const char* what) {
  Array<uint32_t> dx(x), dy(y), out(kNumbers);
  apply<<<kNumbers / 128, 128>>>(dx, dy, out, device);
  launched(what);
  expect_all(out, [&](size_t i) { return host(x[i], y[i]); }, what);
}

int main() {
  Random random;
  // Elements at their limits are as frequent as all others.
  auto number = [&](size_t) {
    uint32_t x = random();
    constexpr uint8_t kEdges[] = {0x00, 0x01, 0x7f, 0x80, 0xff};
    for (int i = 0; i < 32; i += 8)
      if (random() % 2) x = (x & ~(0xffu << i)) | uint32_t{kEdges[random() % 5]} << i;
    return x;
  };
  const std::vector<uint32_t> x = generate<uint32_t>(kNumbers, number), y = generate<uint32_t>(kNumbers, number);

// The operands of the intrinsic come last: it has one or two.
#define ONE(name, count, is_signed, value, ...)                                                            \
  compare(                                                                                                 \
      x, y, [] __device__(uint32_t a, uint32_t b) -> uint32_t { return __##name##count(__VA_ARGS__); },    \
      [](uint32_t p, uint32_t q) {                                                                         \
        return of_elements<count>(p, q, is_signed, [](int64_t a, int64_t b, int64_t kLow, int64_t kHigh) { \
          return static_cast<void>(kLow), static_cast<void>(kHigh), static_cast<int64_t>(value);           \
        });                                                                                                \
      },                                                                                                   \
      #name #count);
#define BOTH(name, is_signed, value) ONE(name, 2, is_signed, value, a, b) ONE(name, 4, is_signed, value, a, b)
#define BOTH_UNARY(name, is_signed, value) ONE(name, 2, is_signed, value, a) ONE(name, 4, is_signed, value, a)
  ELEMENTWISE(BOTH)
  UNARY(BOTH_UNARY)

#define ONE_SUM(name, count, is_signed)                                                          \
  compare(                                                                                       \
      x, y, [] __device__(uint32_t a, uint32_t b) -> uint32_t { return __##name##count(a, b); }, \
      [](uint32_t p, uint32_t q) {                                                               \
        int64_t sum = 0;                                                                         \
        for (int i = 0; i < count; ++i)                                                          \
          sum += std::abs(element<count>(p, i, is_signed) - element<count>(q, i, is_signed));    \
        return static_cast<uint32_t>(sum);                                                       \
      },                                                                                         \
      #name #count);
#define BOTH_SUMS(name, is_signed) ONE_SUM(name, 2, is_signed) ONE_SUM(name, 4, is_signed)
  SUMS(BOTH_SUMS)

  auto with_zero = [](int64_t v) { return std::max<int64_t>(v, 0); };
  compare(
      x, y, [] __device__(uint32_t a, uint32_t b) -> uint32_t { return __vimax_s16x2_relu(a, b); },
      [&](uint32_t p, uint32_t q) {
        return of_elements<2>(p, q, true,
                              [&](int64_t a, int64_t b, int64_t, int64_t) { return with_zero(std::max(a, b)); });
      },
      "max.s16x2.relu");
  compare(
      x, y, [] __device__(uint32_t a, uint32_t b) -> uint32_t { return __vimin_s16x2_relu(a, b); },
      [&](uint32_t p, uint32_t q) {
        return of_elements<2>(p, q, true,
                              [&](int64_t a, int64_t b, int64_t, int64_t) { return with_zero(std::min(a, b)); });
      },
      "min.s16x2.relu");
  compare(
      x, y, [] __device__(uint32_t a, uint32_t b) -> uint32_t { return __viaddmax_s16x2(a, b, a ^ b); },
      [](uint32_t p, uint32_t q) {
        const uint32_t sum = of_elements<2>(p, q, true, [](int64_t a, int64_t b, int64_t, int64_t) { return a + b; });
        return of_elements<2>(sum, p ^ q, true, [](int64_t a, int64_t b, int64_t, int64_t) { return std::max(a, b); });
      },
      "__viaddmax_s16x2");
  return failures != 0;
}
