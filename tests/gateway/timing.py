"""How the time that work takes grows with its size."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def grows_in_proportion(work: Callable[[int], object], size: int) -> bool:
    """Whether four times as much work takes about four times as long, and not sixteen times."""
    small_s, large_s = (min(_seconds(work, n) for _ in range(3)) for n in (size, 4 * size))
    return large_s < 3 * 4 * small_s


def _seconds(work: Callable[[int], object], size: int) -> float:
    # The collector looks at everything there is, so its time grows with the test run.
    gc.disable()
    try:
        began_s = time.process_time()
        work(size)
        return time.process_time() - began_s
    finally:
        gc.enable()
