// SPDX-License-Identifier: Apache-2.0
// What the programs share: device arrays, and expectations that are printed and decide the exit status.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

inline int failures = 0;

inline void expect(bool ok, const char* what) {
  std::printf("%s: %s\n", ok ? "ok" : "WRONG", what);
  failures += !ok;
}

// Every call that should succeed, and the launch before it.
inline void succeed(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    std::printf("WRONG: %s: %s\n", what, cudaGetErrorString(status));
    ++failures;
  }
}
inline void launched(const char* what) {
  succeed(cudaGetLastError(), what);
  succeed(cudaDeviceSynchronize(), what);
}

// Memory of the device, of exactly these elements.
template <class T>
class Array {
 public:
  explicit Array(size_t size, T value = T{}) : Array(std::vector<T>(size, value)) {}
  explicit Array(const std::vector<T>& values) : size_(values.size()) {
    succeed(cudaMalloc(&data_, size_ * sizeof(T)), "cudaMalloc");
    succeed(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice), "copy to the device");
  }
  ~Array() { succeed(cudaFree(data_), "cudaFree"); }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  operator T*() const { return data_; }
  size_t size() const { return size_; }
  std::vector<T> host() const {
    std::vector<T> values(size_);
    succeed(cudaMemcpy(values.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "copy from the device");
    return values;
  }

 private:
  T* data_ = nullptr;
  size_t size_;
};

// A fixed sequence of numbers in [0, 2^32).
class Random {
 public:
  uint32_t operator()() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  float uniform() { return static_cast<float>((*this)() >> 8) * 0x1p-24f; }  // [0, 1)

 private:
  uint64_t state_ = 42;
};

template <class T, class F>
std::vector<T> generate(size_t size, F&& f) {
  std::vector<T> values;
  for (size_t i = 0; i < size; ++i) values.push_back(f(i));
  return values;
}

// expect(device[i] == f(i)) for all i; says where it is not.
template <class T, class F>
void expect_all(const Array<T>& device, F&& f, const char* what) {
  const std::vector<T> values = device.host();
  for (size_t i = 0; i < values.size(); ++i) {
    if (!(values[i] == f(i))) {
      std::printf("at %zu of %zu: %g, not %g\n", i, values.size(), static_cast<double>(values[i]),
                  static_cast<double>(f(i)));
      return expect(false, what);
    }
  }
  expect(true, what);
}
template <class T, class F>
void expect_close(const Array<T>& device, F&& f, double tolerance, const char* what) {
  const std::vector<T> values = device.host();
  for (size_t i = 0; i < values.size(); ++i) {
    const double value = static_cast<double>(values[i]), truth = f(i);
    if (!(std::abs(value - truth) <= tolerance * std::fmax(1.0, std::abs(truth))) && !(value == truth) &&
        !(std::isnan(value) && std::isnan(truth))) {
      std::printf("at %zu of %zu: %.9g, not %.9g\n", i, values.size(), value, truth);
      return expect(false, what);
    }
  }
  expect(true, what);
}
