// SPDX-License-Identifier: Apache-2.0
// Memory of this process that kernels may touch, for those who did not allocate it by cudaMalloc. C, like the runtime.
// The same range may be registered more than once; each registration is taken back once, by the same range. `name` is
// for messages.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

void emulator_register_memory(const void* begin, uint64_t num_bytes, const char* name);
void emulator_unregister_memory(const void* begin, uint64_t num_bytes);

#ifdef __cplusplus
}
#endif
