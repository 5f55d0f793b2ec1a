# SPDX-License-Identifier: Apache-2.0
"""Hypothesis draws the same examples in every run, and no test leaves another thread count behind."""

import zlib

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("fmkernels", derandomize=True, deadline=None, max_examples=60, database=None)
hypothesis.settings.load_profile("fmkernels")


@pytest.fixture(autouse=True)
def _seed(request):
    """Random numbers follow from the test's own id, whatever ran before it."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def _keep_num_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
