# SPDX-License-Identifier: Apache-2.0
"""Whether what was drawn has the distribution that it should have."""

import torch

FALSE_ALARM = 1e-6  # of one chi-square test; seeds are fixed, so a test that passes once passes always


def chi_square(observed, expected):
    """The probability that a right sampler deviates more; counts of the same total."""
    kept = expected > 0
    assert (observed[~kept] == 0).all()
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    return torch.special.gammaincc((kept.sum().double() - 1) / 2, statistic / 2)
