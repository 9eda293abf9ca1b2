"""A circuit breaker: a model that is down is left alone for a while instead of being waited for again and again.

References
----------
Nygard (2018), "Release It!", 2nd edition, section 5.2.
"""

from __future__ import annotations

from collections.abc import Callable

#: So many failures in a row open the breaker.
FAILURES = 5
#: How long it stays open at first, and at most; each failed probe doubles it.
PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0


class Breaker:
    """Whether a model may be asked: always while it works; after FAILURES failures in a row not until a pause is over.

    Then one call is let through to find out. Its success closes the breaker, its failure begins a pause twice as long.
    """

    def __init__(self, clock_s: Callable[[], float]) -> None:
        self._clock_s = clock_s
        self._failures = 0
        self._pause_s = PAUSE_S
        self._open_until_s: float | None = None
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Whether the model is taken to be down."""
        return self._open_until_s is not None

    def admits(self) -> bool:
        """Whether a call may be made now; one that may is to be ended by `succeeded`, `failed` or `withdrawn`."""
        if self._open_until_s is None:
            return True
        if self._probing or self._clock_s() < self._open_until_s:
            return False
        self._probing = True
        return True

    def succeeded(self) -> None:
        """A call was answered: the model works."""
        self._failures, self._pause_s = 0, PAUSE_S
        self._open_until_s, self._probing = None, False

    def failed(self) -> None:
        """A call was not answered. Calls that began before the breaker opened do not prolong the pause."""
        self._failures += 1
        if self._open_until_s is None and self._failures >= FAILURES:
            self._open_until_s = self._clock_s() + self._pause_s
        elif self._probing:
            self._probing = False
            self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
            self._open_until_s = self._clock_s() + self._pause_s

    def withdrawn(self) -> None:
        """A call was given up before the model could show whether it works."""
        self._probing = False
