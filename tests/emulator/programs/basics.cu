// SPDX-License-Identifier: Apache-2.0
// Indices, parameters, module variables, integer and floating types.
#include "program.h"

__global__ void add(const float* a, const float* b, float* sum, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) sum[i] = a[i] + b[i];
}

__global__ void grid_stride(double* x, int64_t n, double factor) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{blockDim.x} * gridDim.x) {
    x[i] = fma(x[i], factor, 1.0);
  }
}

__global__ void three_dimensions(uint32_t* out) {
  const uint3 size = make_uint3(gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z);
  const uint32_t x = blockIdx.x * blockDim.x + threadIdx.x, y = blockIdx.y * blockDim.y + threadIdx.y,
                 z = blockIdx.z * blockDim.z + threadIdx.z;
  out[(z * size.y + y) * size.x + x] = x + 100 * y + 10000 * z;
}

struct Point {
  double x;
  float y[3];
  int8_t tag;
  int16_t small;
};
struct Params {
  Point point;
  const int* indices;
  int64_t strides[4];
  bool flag;
};
__global__ void structs(Params p, Point* out, char c, uint8_t u, int16_t s, bool b) {
  out[threadIdx.x] = p.point;
  out[threadIdx.x].x += p.indices[threadIdx.x] * p.strides[threadIdx.x % 4] + c + u + s + b + p.flag;
}

__constant__ float weights[5] = {1, 2, 3, 4, 5};
__constant__ int chosen;
__device__ int calls = 7;
__device__ double table[3];
__device__ int* pointer = &calls;
__managed__ int managed = 3;
__global__ void variables(float* out) {
  out[threadIdx.x] = weights[threadIdx.x] * chosen;
  if (threadIdx.x == 0) {
    ++calls;
    *pointer += 10;
    managed *= 2;
    for (int i = 0; i < 3; ++i) table[i] = i + 0.5;
  }
}

template <class T>
__global__ void divide(const T* a, const T* b, T* quotient, T* rest) {
  const int i = threadIdx.x;
  quotient[i] = a[i] / b[i];
  rest[i] = a[i] % b[i];
}

template <class T>
void test_divide(const char* what) {
  Random random;
  const auto wide = [&] { return static_cast<T>((uint64_t{random()} << 32 | random()) >> random() % 50); };
  const auto a = generate<T>(256, [&](size_t) { return wide(); });
  const auto b = generate<T>(256, [&](size_t) { return static_cast<T>(wide() | 1); });
  Array<T> da(a), db(b), quotient(256), rest(256);
  divide<<<1, 256>>>(static_cast<const T*>(da), static_cast<const T*>(db), static_cast<T*>(quotient),
                     static_cast<T*>(rest));
  launched(what);
  expect_all(quotient, [&](size_t i) { return static_cast<T>(a[i] / b[i]); }, what);
  expect_all(rest, [&](size_t i) { return static_cast<T>(a[i] % b[i]); }, what);
}

__global__ void vectors(const float4* in, float4* out, const uchar4* bytes, ushort2* pairs) {
  const int i = threadIdx.x;
  const float4 v = in[i];
  out[i] = make_float4(v.w, v.z, v.y, v.x);
  const uchar4 b = bytes[i];
  pairs[i] = make_ushort2(b.x * b.y, b.z * b.w);
}

__global__ void unaligned(const char* in, int* out) {
  int value;
  memcpy(&value, in + 3 * threadIdx.x + 1, sizeof value);
  out[threadIdx.x] = value;
}

int main() {
  {
    const int n = 1003;
    const auto a = generate<float>(n, [](size_t i) { return 0.25f * i; });
    Array<float> da(a), db(n, 1.5f), sum(n);
    add<<<(n + 127) / 128, 128>>>(da, db, sum, n);
    launched("add");
    expect_all(sum, [&](size_t i) { return a[i] + 1.5f; }, "a ragged last block");
  }
  {
    Array<double> x(generate<double>(5000, [](size_t i) { return i; }));
    grid_stride<<<3, 96>>>(x, 5000, 0.5);
    launched("grid_stride");
    expect_all(x, [](size_t i) { return 0.5 * i + 1; }, "a loop over the grid in double");
  }
  {
    Array<uint32_t> out(6 * 8 * 10);
    three_dimensions<<<dim3(2, 4, 5), dim3(3, 2, 2)>>>(out);
    launched("three_dimensions");
    expect_all(out, [](size_t i) { return uint32_t(i % 6 + 100 * (i / 6 % 8) + 10000 * (i / 48)); }, "x, y and z");
  }
  {
    Array<int> indices(generate<int>(32, [](size_t i) { return int(i) - 5; }));
    Params p{{1.25, {1, 2, 3}, -7, -300}, indices, {1, -2, int64_t{1} << 33, 4}, true};
    Point* out;
    succeed(cudaMalloc(&out, 32 * sizeof(Point)), "cudaMalloc");
    structs<<<1, 32>>>(p, out, 'a', 200, -1000, true);
    launched("structs");
    std::vector<Point> host(32);
    succeed(cudaMemcpy(host.data(), out, 32 * sizeof(Point), cudaMemcpyDefault), "copy");
    bool ok = true;
    for (int i = 0; i < 32; ++i) {
      const double x = 1.25 + (i - 5) * double(p.strides[i % 4]) + 'a' + 200 - 1000 + 1 + 1;
      ok = ok && host[i].x == x && host[i].y[2] == 3 && host[i].tag == -7 && host[i].small == -300;
    }
    expect(ok, "structs by value, and small parameters");
    succeed(cudaFree(out), "cudaFree");
  }
  {
    const int three = 3;
    succeed(cudaMemcpyToSymbol(chosen, &three, sizeof three), "cudaMemcpyToSymbol");
    Array<float> out(5);
    variables<<<1, 5>>>(out);
    launched("variables");
    expect_all(out, [](size_t i) { return 3.0f * (i + 1); }, "constants");
    int now = 0;
    double doubles[3];
    succeed(cudaMemcpyFromSymbol(&now, calls, sizeof now), "cudaMemcpyFromSymbol");
    succeed(cudaMemcpyFromSymbol(doubles, table, sizeof doubles), "cudaMemcpyFromSymbol");
    expect(now == 18 && doubles[0] == 0.5 && doubles[2] == 2.5, "variables of the device, and a pointer to one");
    expect(managed == 6, "a managed variable");
    void* address = nullptr;
    size_t size = 0;
    succeed(cudaGetSymbolAddress(&address, table), "cudaGetSymbolAddress");
    succeed(cudaGetSymbolSize(&size, table), "cudaGetSymbolSize");
    succeed(cudaMemset(address, 0, size), "cudaMemset");
    succeed(cudaMemcpyFromSymbol(doubles, table, sizeof doubles), "cudaMemcpyFromSymbol");
    expect(size == 24 && doubles[1] == 0, "the address of a variable");
  }
  test_divide<int32_t>("int32");
  test_divide<uint32_t>("uint32");
  test_divide<int64_t>("int64");
  test_divide<uint64_t>("uint64");
  test_divide<int16_t>("int16");
  test_divide<uint8_t>("uint8");
  {
    Array<float4> in(generate<float4>(32, [](size_t i) { return make_float4(i, i + 1, i + 2, i + 3); })), out(32);
    Array<uchar4> bytes(generate<uchar4>(32, [](size_t i) { return make_uchar4(i, 255, 200, 8 * i); }));
    Array<ushort2> pairs(32);
    vectors<<<1, 32>>>(in, out, bytes, pairs);
    launched("vectors");
    bool ok = true;
    for (int i = 0; i < 32; ++i) {
      ok = ok && out.host()[i].x == i + 3 && out.host()[i].w == i && pairs.host()[i].x == i * 255 &&
           pairs.host()[i].y == 200 * (8 * i);
    }
    expect(ok, "vector loads and stores");
  }
  {
    Array<char> in(generate<char>(100, [](size_t i) { return char(i * 37); }));
    Array<int> out(32);
    unaligned<<<1, 32>>>(in, out);
    launched("unaligned");
    const auto host = in.host();
    expect_all(
        out,
        [&](size_t i) {
          int v;
          memcpy(&v, host.data() + 3 * i + 1, 4);
          return v;
        },
        "bytes to an int");
  }
  return failures != 0;
}
