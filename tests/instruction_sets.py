# SPDX-License-Identifier: Apache-2.0
"""The instruction sets of the CPU kernels: the one in use, and those below it, to which another process may be held."""

from fmkernels import doctor

_ALL = ("generic", "avx2", "avx512")
IN_USE = doctor.instruction_set() or "generic"
BELOW = _ALL[: _ALL.index(IN_USE)]
