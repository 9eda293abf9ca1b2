"""Verdicts given before: what counts as the same question, how long and how many are kept, and who asks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from msgspec.structs import replace

from gateway.local_bus import InProcessBus
from gateway.ports import Bus
from gateway.verdicts import Verdicts
from tests.fakes import FakeClock
from validators import CheckResult, Finding, Opinion, Outcome

OPINION = Opinion("logprob", ("m-1",), {"ok": 0.9}, rationale="It said ada@example.com.")
PASS = CheckResult("toy", Outcome.PASS, score=0.9, latency_ms=7, cost_usd=1.5, opinion=OPINION)
FAIL = CheckResult("toy", Outcome.FAIL, score=0.1, findings=(Finding("choices[0]", "no", (1, 2)),))
ERROR = CheckResult("toy", Outcome.ERROR, error="it is tired")


class SharedBus(InProcessBus):
    """A bus with a memory that replicas share; `gate` holds up what is recalled."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[str, bytes] = {}

    async def recall(self, key: str) -> bytes | None:
        return self.kept.get(key)

    async def keep(self, key: str, value: bytes, for_s: float) -> None:
        self.kept[key] = value


class Asker:
    """Gives these results in turn, and counts."""

    def __init__(self, *results: CheckResult, gate: asyncio.Event | None = None) -> None:
        self.results = list(results)
        self.count = 0
        self.gate = gate
        self.asked = asyncio.Event()

    async def __call__(self) -> CheckResult:
        self.count += 1
        self.asked.set()
        if self.gate is not None:
            await self.gate.wait()
        return self.results.pop(0) if len(self.results) > 1 else self.results[0]


class Cache:
    """Verdicts of one process."""

    def __init__(self, bus: Bus | None = None, *, limit_bytes: int = 10_000) -> None:
        self.clock = FakeClock()
        self.verdicts = Verdicts(
            bus or InProcessBus(), self.clock, limit_bytes=limit_bytes, keep_s=60
        )

    async def __call__(
        self, key: str, ask: Callable[[], Awaitable[CheckResult]], within_s: float = 5
    ) -> CheckResult:
        deadline_s = asyncio.get_running_loop().time() + within_s
        return await self.verdicts.verdict(key, ask, deadline_s=deadline_s)


class TestKeeping:
    @pytest.mark.parametrize("result", [PASS, FAIL], ids=["pass", "fail"])
    async def test_a_verdict_is_given_again_for_nothing(self, result: CheckResult) -> None:
        cache, ask = Cache(), Asker(result)
        assert await cache("k", ask) == result
        again = await cache("k", ask)
        assert again == replace(result, cached=True, cost_usd=0.0, latency_ms=0.0)
        assert ask.count == 1

    async def test_an_error_is_not_kept(self) -> None:
        bus = SharedBus()
        cache, ask = Cache(bus), Asker(ERROR, PASS)
        assert [await cache("k", ask), (await cache("k", ask)).cached] == [ERROR, False]
        assert list(bus.kept) == ["k"]

    async def test_a_verdict_is_forgotten_in_time(self) -> None:
        cache, ask = Cache(), Asker(PASS)
        await cache("k", ask)
        cache.clock.advance(59.9)
        assert (await cache("k", ask)).cached
        cache.clock.advance(0.1)
        assert not (await cache("k", ask)).cached

    async def test_the_verdict_not_asked_for_longest_makes_room(self) -> None:
        cache, ask = Cache(limit_bytes=2000), Asker(PASS)
        for number in range(3):
            await cache(str(number), ask)
        await cache("0", ask)
        for number in range(3, 5):
            await cache(str(number), ask)
        ask.count = 0
        assert [(await cache(key, ask)).cached for key in "01"] == [True, False]

    async def test_memory_is_bounded_and_counted_right(self) -> None:
        cache, ask = Cache(limit_bytes=3000), Asker(PASS)
        for number in range(500):
            await cache(str(number % 40), ask)
            cache.clock.advance(7)
        kept = cache.verdicts._kept
        size = sum(len(packed) + 300 for _, packed in kept.values())
        assert size == cache.verdicts._size_bytes <= 3000
        assert kept

    async def test_with_no_room_at_all_everybody_asks(self) -> None:
        cache, gate = Cache(SharedBus(), limit_bytes=0), asyncio.Event()
        ask = Asker(PASS, gate=gate)
        asking = [asyncio.create_task(cache("k", ask)) for _ in range(3)]
        await asyncio.sleep(0)
        assert ask.count == 3
        gate.set()
        assert not any(each.cached for each in await asyncio.gather(*asking))


class TestAskingTogether:
    async def test_one_asks_and_the_others_wait_for_it(self) -> None:
        cache, gate = Cache(), asyncio.Event()
        ask = Asker(PASS, gate=gate)
        asking = [asyncio.create_task(cache("k", ask)) for _ in range(5)]
        await ask.asked.wait()
        gate.set()
        cached = [each.cached for each in await asyncio.gather(*asking)]
        assert (sorted(cached), ask.count) == ([False, True, True, True, True], 1)

    async def test_if_it_gets_no_verdict_the_next_one_asks(self) -> None:
        cache, gate = Cache(), asyncio.Event()
        ask = Asker(ERROR, PASS, gate=gate)
        asking = [asyncio.create_task(cache("k", ask)) for _ in range(3)]
        await ask.asked.wait()
        gate.set()
        results = await asyncio.gather(*asking)
        assert [each.outcome for each in results] == [Outcome.ERROR, Outcome.PASS, Outcome.PASS]
        assert ask.count == 2

    async def test_if_its_client_leaves_the_next_one_asks(self) -> None:
        cache, gate = Cache(), asyncio.Event()
        ask = Asker(PASS, gate=gate)
        first, second = (asyncio.create_task(cache("k", ask)) for _ in range(2))
        await ask.asked.wait()
        first.cancel()
        gate.set()
        assert (await second).outcome is Outcome.PASS
        assert first.cancelled()
        assert ask.count == 2

    async def test_a_client_that_leaves_while_it_waits_disturbs_nobody(self) -> None:
        cache, gate = Cache(), asyncio.Event()
        ask = Asker(PASS, gate=gate)
        first, second = (asyncio.create_task(cache("k", ask)) for _ in range(2))
        await ask.asked.wait()
        await asyncio.sleep(0)
        second.cancel()
        gate.set()
        assert (await first).outcome is Outcome.PASS
        assert ask.count == 1

    async def test_nobody_waits_longer_than_it_can(self) -> None:
        cache = Cache()
        ask = Asker(PASS, gate=asyncio.Event())
        first = asyncio.create_task(cache("k", ask))
        await ask.asked.wait()
        with pytest.raises(TimeoutError):
            await cache("k", ask, within_s=0.02)
        first.cancel()


class TestSharing:
    async def test_replicas_share_verdicts_but_not_the_judges_words(self) -> None:
        bus, ask = SharedBus(), Asker(PASS)
        one, other = Cache(bus), Cache(bus)
        await one("k", ask)
        shared = await other("k", ask)
        assert (shared.cached, shared.score, ask.count) == (True, 0.9, 1)
        assert shared.opinion == replace(OPINION, rationale="")
        bus.kept.clear()
        assert (await other("k", ask)).cached

    @pytest.mark.parametrize(
        "junk",
        [
            b"",
            b"null",
            b"\xff",
            b"{}",
            b'{"check":"toy","outcome":"error","error":"x"}',
            b'{"check":"toy","outcome":"pass","score":7}',
            b'{"check":"toy","outcome":"maybe"}',
        ],
        ids=str,
    )
    async def test_junk_in_the_shared_memory_is_no_verdict(self, junk: bytes) -> None:
        bus, ask = SharedBus(), Asker(FAIL)
        bus.kept["k"] = junk
        assert await Cache(bus)("k", ask) == FAIL
        assert ask.count == 1
