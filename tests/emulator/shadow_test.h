// SPDX-License-Identifier: Apache-2.0
// What the files of shadow_test share.
#pragma once

#include <cstdint>
#include <cstdio>

extern int num_failed;

inline void expect(bool condition, const char* what, const char* file, int line) {
  if (condition) return;
  std::printf("%s:%d: %s\n", file, line, what);
  num_failed++;
}
#define EXPECT(condition) expect(condition, #condition, __FILE__, __LINE__)

inline const void* at(uint64_t address) { return reinterpret_cast<const void*>(address); }

// memory_test.cpp
void test_device_memory();
// global_shadow_test.cpp
void test_global_shadow();
