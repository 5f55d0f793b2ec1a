# SPDX-License-Identifier: Apache-2.0
"""Kernels that are made faulty on purpose: one synchronisation taken out of the PTX that the emulator runs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

SYNCHRONISATION = re.compile(
    r"^\s*(?:bar(?:rier)?(?:\.cta)?\.sync|bar\.warp\.sync|cp\.async\.wait_group)\b.*;[ \t]*$"
    r"|^\s*bar(?:rier)?(?:\.cta)?\.red\.or\.pred\s+(?P<result>%p\d+), 0, (?P<own>%p\d+);[ \t]*$",
    re.MULTILINE,
)


def missing_synchronisations(kernel: str, instance: str, run: Callable[[], None]) -> tuple[int, list[int]]:
    """Runs with each barrier and each wait of a kernel missing in turn: (how many there are, those not reported).

    The mangled name of the kernel, or of a function that kernels call, contains `kernel` and `instance`.
    """
    import emulator

    counts: list[int] = []

    def bodies(text: str) -> list[tuple[int, int]]:
        functions = re.finditer(r"^(?:\.visible )?\.(?:entry|func) ", text, re.MULTILINE)
        starts = [*(match.start() for match in functions), len(text)]
        return [
            (a, b)
            for a, b in itertools.pairwise(starts)
            if kernel in text[a : a + 400] and instance in text[a : a + 400]
        ]

    def count(text: str) -> str:
        counts.extend(len(SYNCHRONISATION.findall(text, *body)) for body in bodies(text))
        return text

    def without(number: int) -> Callable[[str], str]:
        def edit(text: str) -> str:
            for begin, end in bodies(text):
                found = list(SYNCHRONISATION.finditer(text, begin, end))
                if number < len(found):
                    result, own = found[number]["result"], found[number]["own"]
                    instead = f"mov.pred {result}, {own};" if result else ""  # a warp's answer for that of the block
                    text = text[: found[number].start()] + instead + text[found[number].end() :]
            return text

        return edit

    with emulator.edited(count):
        run()
    unseen = []
    for number in range(max(counts, default=0)):
        with emulator.edited(without(number)):
            try:
                run()
                unseen.append(number)
            except emulator.FaultError:
                pass
    return max(counts, default=0), unseen
