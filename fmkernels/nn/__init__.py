# SPDX-License-Identifier: Apache-2.0
"""Modules over the ops; their state dicts are those of the modules they replace."""

from .attention import Attention

__all__ = ["Attention"]
