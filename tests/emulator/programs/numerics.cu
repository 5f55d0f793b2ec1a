// SPDX-License-Identifier: Apache-2.0
// Arithmetic and functions of the CUDA headers against the host's.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <bit>

#include "program.h"

constexpr int kNumbers = 512;

__global__ void functions(const float* in, float* out) {
  const int i = threadIdx.x;
  const float x = in[i];
  float* row = out + i;
  const float values[] = {expf(x),         logf(fabsf(x)),
                          sinf(x * 100),   cosf(x * 1e6f),
                          tanf(x),         powf(fabsf(x), 1.7f),
                          erff(x),         tanhf(x),
                          sqrtf(fabsf(x)), 1.0f / x,
                          cbrtf(x),        atan2f(x, 2.0f),
                          fmodf(x, 0.7f),  floorf(x),
                          rintf(x),        lgammaf(x + 20),
                          exp2f(x),        rsqrtf(fabsf(x)),
                          hypotf(x, 3),    log1pf(fabsf(x)),
                          __expf(x),       __fdividef(x, 3.0f),
                          truncf(x),       roundf(x)};
  for (int f = 0; f < 24; ++f) row[f * kNumbers] = values[f];
}
double host_function(int f, double x) {
  switch (f) {
    case 0: return std::exp(x);
    case 1: return std::log(std::abs(x));
    case 2: return std::sin(double(float(x) * 100.0f));
    case 3: return std::cos(double(float(x) * 1e6f));
    case 4: return std::tan(x);
    case 5: return std::pow(std::abs(x), double(1.7f));
    case 6: return std::erf(x);
    case 7: return std::tanh(x);
    case 8: return std::sqrt(std::abs(x));
    case 9: return 1 / x;
    case 10: return std::cbrt(x);
    case 11: return std::atan2(x, 2.0);
    case 12: return std::fmod(x, double(0.7f));
    case 13: return std::floor(x);
    case 14: return std::rint(x);
    case 15: return std::lgamma(double(float(x) + 20.0f));
    case 16: return std::exp2(x);
    case 17: return 1 / std::sqrt(std::abs(x));
    case 18: return std::hypot(x, 3.0);
    case 19: return std::log1p(std::abs(x));
    case 20: return std::exp(x);
    case 21: return x / 3;
    case 22: return std::trunc(x);
    default: return std::round(x);
  }
}

__global__ void functions_of_double(const double* in, double* out) {
  const int i = threadIdx.x;
  const double x = in[i];
  const double values[] = {exp(x), log(fabs(x)),      sin(x * 1e5), sqrt(fabs(x)),
                           1 / x,  pow(fabs(x), 2.5), erfc(x),      rint(x)};
  for (int f = 0; f < 8; ++f) out[f * kNumbers + i] = values[f];
}

__global__ void integers(const uint32_t* in, uint32_t* out) {
  const int i = threadIdx.x;
  const uint32_t x = in[i], y = in[(i + 1) % kNumbers];
  const uint64_t wide = uint64_t{x} << 32 | y;
  const uint32_t values[] = {uint32_t(__clz(x)),
                             uint32_t(__popc(x)),
                             __brev(x),
                             uint32_t(__ffs(x)),
                             __byte_perm(x, y, 0x5410),
                             __funnelshift_l(x, y, 7),
                             __umulhi(x, y),
                             uint32_t(__mulhi(int(x), int(y))),
                             __usad(x, y, 3),
                             uint32_t(__dp4a(int(x), int(y), 100)),
                             uint32_t(__clzll(wide)),
                             uint32_t(__popcll(wide)),
                             uint32_t(__umul64hi(wide, wide) >> 32),
                             __vadd4(x, y),
                             uint32_t(__float2int_rn(__uint_as_float(x))),
                             uint32_t(__double2uint_rz(x * 0.75)),
                             __float_as_uint(__uint2float_rz(x)),
                             uint32_t(int(x) >> (y & 31)),
                             uint32_t((int64_t(wide) >> (y & 63))),
                             __vminu4(x, y)};
  for (int f = 0; f < 20; ++f) out[f * kNumbers + i] = values[f];
}
uint32_t bytes_of(uint32_t x, uint32_t y, uint32_t (*f)(uint32_t, uint32_t)) {
  uint32_t result = 0;
  for (int b = 0; b < 32; b += 8) result |= (f(x >> b & 255, y >> b & 255) & 255) << b;
  return result;
}
uint32_t host_integer(int f, uint32_t x, uint32_t y) {
  const uint64_t wide = uint64_t{x} << 32 | y;
  switch (f) {
    case 0: return x ? __builtin_clz(x) : 32;
    case 1: return __builtin_popcount(x);
    case 2: {
      uint32_t r = 0;
      for (int b = 0; b < 32; ++b) r |= (x >> b & 1) << (31 - b);
      return r;
    }
    case 3: return __builtin_ffs(x);
    case 4: return (x & 0xffff) | y << 16;
    case 5: return uint32_t((uint64_t{y} << 32 | x) >> 25);
    case 6: return uint32_t(uint64_t{x} * y >> 32);
    case 7: return uint32_t(int64_t{int(x)} * int(y) >> 32);
    case 8: return (x > y ? x - y : y - x) + 3;
    case 9: {
      int sum = 100;
      for (int b = 0; b < 32; b += 8) sum += int(int8_t(x >> b)) * int8_t(y >> b);
      return sum;
    }
    case 10: return wide ? __builtin_clzll(wide) : 64;
    case 11: return __builtin_popcountll(wide);
    case 12: return uint32_t(uint64_t(static_cast<unsigned __int128>(wide) * wide >> 64) >> 32);
    case 13: return bytes_of(x, y, [](uint32_t a, uint32_t b) { return a + b; });
    case 14: {
      const float value = std::bit_cast<float>(x);
      if (std::isnan(value)) return 0;
      return value >= 0x1p31f ? 0x7fffffff : value <= -0x1p31f ? 0x80000000 : uint32_t(int(std::nearbyint(value)));
    }
    case 15: return uint32_t(x * 0.75);
    case 16: {
      const double exact = x;
      float value = float(exact);
      if (value > exact) value = std::nextafter(value, 0.0f);
      return std::bit_cast<uint32_t>(value);
    }
    case 17: return uint32_t(int(x) >> (y & 31));
    case 18: return uint32_t(int64_t(wide) >> (y & 63));
    default: return bytes_of(x, y, [](uint32_t a, uint32_t b) { return a < b ? a : b; });
  }
}

// Conversions to the small types and back, and arithmetic in them.
__global__ void small_floats(const float* in, float* out) {
  const int i = threadIdx.x;
  const float x = in[i], y = in[(i + 7) % kNumbers];
  const __half h = __float2half(x), g = __float2half(y);
  const __nv_bfloat16 b = __float2bfloat16(x), c = __float2bfloat16(y);
  const __half2 pair = __hfma2(__halves2half2(h, g), __halves2half2(g, h), __float2half2_rn(0.5f));
  const float values[] = {__half2float(h),
                          __bfloat162float(b),
                          float(__nv_fp8_e4m3(x)),
                          float(__nv_fp8_e5m2(x)),
                          __half2float(__hadd(h, g)),
                          __half2float(__hmul(h, g)),
                          __half2float(__hdiv(h, g)),
                          __bfloat162float(__hfma(b, c, b)),
                          __low2float(pair),
                          __high2float(pair),
                          __half2float(hexp(h)),
                          __half2float(__hmax(h, g)),
                          float(__hlt(h, g)),
                          __half2float(__int2half_rn(i - 100)),
                          float(__half2int_rz(h)),
                          __bfloat162float(__hmul(b, c))};
  for (int f = 0; f < 16; ++f) out[f * kNumbers + i] = values[f];
}

float bf16_of(double x) {  // round to nearest even
  uint32_t bits = std::bit_cast<uint32_t>(float(x));
  bits += 0x7fff + (bits >> 16 & 1);
  return std::bit_cast<float>(bits & 0xffff0000);
}
float half_of(float x) { return __half2float(__float2half(x)); }  // CUDA's own code, on the host

int main() {
  Random random;
  const auto numbers =
      generate<float>(kNumbers, [&](size_t i) { return i == 0 ? 0.5f : (random.uniform() - 0.5f) * 20; });
  Array<float> in(numbers);
  {
    Array<float> out(24 * kNumbers);
    functions<<<1, kNumbers>>>(in, out);
    launched("functions");
    // What the programming guide allows the worst of them, and a little for the approximate ones.
    expect_close(out, [&](size_t i) { return host_function(i / kNumbers, numbers[i % kNumbers]); }, 2e-6, "functions");
  }
  {
    const auto doubles = generate<double>(kNumbers, [&](size_t) { return (random.uniform() - 0.5) * 20; });
    Array<double> device(doubles), out(8 * kNumbers);
    functions_of_double<<<1, kNumbers>>>(device, out);
    launched("functions_of_double");
    const auto truth = [&](size_t i) {
      const double x = doubles[i % kNumbers];
      const double values[] = {std::exp(x), std::log(std::abs(x)),      std::sin(x * 1e5), std::sqrt(std::abs(x)),
                               1 / x,       std::pow(std::abs(x), 2.5), std::erfc(x),      std::rint(x)};
      return values[i / kNumbers];
    };
    expect_close(out, truth, 1e-14, "functions of double");
  }
  {
    auto words = generate<uint32_t>(kNumbers, [&](size_t i) { return i < 32 ? 1u << i : random(); });
    words[40] = 0, words[41] = ~0u;
    Array<uint32_t> device(words), out(20 * kNumbers);
    integers<<<1, kNumbers>>>(device, out);
    launched("integers");
    const auto truth = [&](size_t i) {
      return host_integer(i / kNumbers, words[i % kNumbers], words[(i % kNumbers + 1) % kNumbers]);
    };
    expect_all(out, truth, "intrinsics of integers");
  }
  {
    Array<float> out(16 * kNumbers);
    small_floats<<<1, kNumbers>>>(in, out);
    launched("small_floats");
    const auto truth = [&](size_t i) -> double {
      const int at = i % kNumbers;
      const float x = numbers[at], y = numbers[(at + 7) % kNumbers], h = half_of(x), g = half_of(y);
      const float b = bf16_of(x), c = bf16_of(y);
      switch (i / kNumbers) {
        case 0: return h;
        case 1: return b;
        case 2: return float(__nv_fp8_e4m3(x));
        case 3: return float(__nv_fp8_e5m2(x));
        case 4: return half_of(h + g);
        case 5: return half_of(h * g);
        case 6: return half_of(float(double(h) / g));
        case 7: return bf16_of(double(b) * c + b);
        case 8: return half_of(float(double(h) * g + 0.5));
        case 9: return half_of(float(double(h) * g + 0.5));
        case 10: return half_of(float(std::exp(double(h))));
        case 11: return h > g ? h : g;
        case 12: return h < g;
        case 13: return at - 100;
        case 14: return std::trunc(h);
        default: return bf16_of(double(b) * c);
      }
    };
    expect_close(out, truth, 1e-3, "half, bfloat16 and fp8");
    bool exact = true;
    const auto host = out.host();
    for (int f : {0, 1, 2, 3, 4, 5, 8, 9, 11, 12, 13, 14, 15}) {
      for (int i = 0; i < kNumbers; ++i) exact = exact && host[f * kNumbers + i] == float(truth(f * kNumbers + i));
    }
    expect(exact, "their conversions, sums and products to the bit");
  }
  return failures != 0;
}
