# SPDX-License-Identifier: Apache-2.0
"""Interfaces of other libraries over the ops: `transformers`, `sdpa` and `flash_attn`, each imported by its name."""
