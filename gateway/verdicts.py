"""Verdicts given before: the same judge asked the same thing need not be asked again.

What counts as the same is told by `gateway.interviews.Interview.key`. Only verdicts are kept, never errors. They are kept in this process and, without what the judge said in
its own words, where the replicas share memory; either may forget.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import msgspec
from msgspec.structs import replace

from gateway.ports import Bus, Clock
from policies import vetted
from validators import CheckResult, Outcome

#: What an entry takes besides its bytes, roughly.
_OVERHEAD_BYTES = 300


class Verdicts:
    """The verdicts kept, at most `limit_bytes` of them (0: none, here or elsewhere), each for `keep_s` seconds."""

    def __init__(self, bus: Bus, clock: Clock, *, limit_bytes: int, keep_s: float) -> None:
        self._bus = bus
        self._clock = clock
        self._limit_bytes = limit_bytes
        self._keep_s = keep_s
        self._kept: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        self._size_bytes = 0
        self._asking: dict[str, asyncio.Future[None]] = {}

    async def verdict(
        self, key: str, ask: Callable[[], Awaitable[CheckResult]], *, deadline_s: float
    ) -> CheckResult:
        """The verdict kept under that key, as `cached`, or else what `ask` gives.

        Of callers that want the same at once one asks, and the others wait for its verdict, until `deadline_s` on the event
        loop's clock. If it gets none, the next one asks.

        Raises
        ------
        TimeoutError
            If the one that asks has no result by then.
        """
        if not self._limit_bytes:
            return await ask()
        while True:
            if (kept := self._recalled(key)) is not None:
                return kept
            asking = self._asking.get(key)
            if asking is None:
                break
            async with asyncio.timeout_at(deadline_s):
                await asyncio.shield(asking)
        ended = self._asking[key] = asyncio.get_running_loop().create_future()
        try:
            return await self._shared(key) or await self._asked(key, ask)
        finally:
            del self._asking[key]
            ended.set_result(None)

    async def _asked(self, key: str, ask: Callable[[], Awaitable[CheckResult]]) -> CheckResult:
        result = await ask()
        if result.outcome is not Outcome.ERROR:
            self._keep(key, _packed(result))
            opinion = result.opinion and replace(result.opinion, rationale="")
            await self._bus.keep(key, _packed(replace(result, opinion=opinion)), self._keep_s)
        return result

    async def _shared(self, key: str) -> CheckResult | None:
        packed = await self._bus.recall(key)
        found = None if packed is None else _unpacked(packed)
        if packed is not None and found is not None:
            self._keep(key, packed)
        return found

    def _recalled(self, key: str) -> CheckResult | None:
        until_s, packed = self._kept.get(key, (0.0, b""))
        if until_s <= self._clock.monotonic_s():
            return None
        self._kept.move_to_end(key)
        return _unpacked(packed)

    def _keep(self, key: str, packed: bytes) -> None:
        self._size_bytes += len(packed) + _OVERHEAD_BYTES
        if key in self._kept:
            self._forget(key)
        self._kept[key] = (self._clock.monotonic_s() + self._keep_s, packed)
        while self._size_bytes > self._limit_bytes:
            self._forget(next(iter(self._kept)))

    def _forget(self, key: str) -> None:
        self._size_bytes -= len(self._kept.pop(key)[1]) + _OVERHEAD_BYTES


def _packed(result: CheckResult) -> bytes:
    return msgspec.json.encode(replace(result, cost_usd=0.0, latency_ms=0.0))


def _unpacked(packed: bytes) -> CheckResult | None:
    """The verdict, which now costs nothing; None for bytes that are none."""
    try:
        result = msgspec.json.decode(packed, type=CheckResult)
    except msgspec.MsgspecError:
        return None
    result = vetted(result)
    return None if result.outcome is Outcome.ERROR else replace(result, cached=True)
