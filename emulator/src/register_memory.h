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

// Of memory that is registered or allocated: another GPU has it, or touches it meanwhile. Between blocks it is ordered
// by releases and acquires that reach the system (.sys), not by those of one GPU; flags in it must reach as far.
void emulator_register_peer_memory(const void* begin, uint64_t num_bytes);
void emulator_unregister_peer_memory(const void* begin, uint64_t num_bytes);

#ifdef __cplusplus
}
#endif
