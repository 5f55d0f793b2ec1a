# SPDX-License-Identifier: Apache-2.0
"""Interfaces of other libraries over the ops: `transformers`, `sdpa`, `flash_attn`, `vllm`, `flashinfer` and `stk`.

Each is imported by its name.
"""
