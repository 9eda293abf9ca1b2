"""The only doubles: a clock that stands still, and providers that say what they are told to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial

from gateway.errors import GatewayError
from gateway.ports import Attempt, UpstreamCall, UpstreamResponse


class FakeClock:
    """A clock that goes on only when it is told to; `looked_at` is set by whoever looks at it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.looked_at = asyncio.Event()

    def now(self) -> datetime:
        """The time, aware UTC."""
        return datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC) + timedelta(seconds=self.seconds)

    def monotonic_s(self) -> float:
        """The seconds that have gone by."""
        self.looked_at.set()
        return self.seconds

    def advance(self, seconds: float) -> None:
        """Let so much time go by."""
        self.seconds += seconds


@dataclass
class Says:
    """One answer of a provider: it begins once `gate` is set, and after its chunks `fault` is raised."""

    chunks: bytes | Sequence[bytes] = b""
    status: int = 200
    headers: Sequence[tuple[str, str]] = (("content-type", "application/json"),)
    gate: asyncio.Event | None = None
    fault: GatewayError | None = None

    @property
    def parts(self) -> Sequence[bytes]:
        """The chunks, as a list."""
        return [self.chunks] if isinstance(self.chunks, bytes) else self.chunks


@dataclass
class ScriptedModels:
    """Providers that give these answers in turn, the last one again and again.

    `top` is how many logprobs they give, None if none. `calls` is what they were asked.
    """

    answers: Sequence[Says | GatewayError]
    top: int | None = None
    calls: list[UpstreamCall] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    _closed: set[int] = field(default_factory=set)

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        """Give the next answer."""
        answer = self.answers[min(len(self.calls), len(self.answers) - 1)]
        self.calls.append(call)
        self.asked.set()
        if isinstance(answer, GatewayError):
            call.attempts.append(Attempt(call.model, None, answer.code, 1.0))
            raise answer
        if answer.gate is not None:
            await answer.gate.wait()
        call.attempts.append(Attempt(call.model, answer.status, None, 1.0))
        letting_go = partial(self._closed.add, len(self.calls))
        return UpstreamResponse(answer.status, list(answer.headers), _chunks(answer), letting_go)

    @property
    def closed(self) -> int:
        """How many answers were let go of."""
        return len(self._closed)

    def top_logprobs(self, model: str) -> int | None:
        """The number of alternatives, whatever the model."""
        return self.top

    def refuses_logprobs(self, model: str, status: int, body: bytes) -> bool:
        """True for a refusal that speaks of logprobs."""
        return status == 400 and b"logprobs" in body

    def list_models(self) -> bytes | None:
        """None: the provider is to be asked."""
        return None


async def _chunks(answer: Says) -> AsyncIterator[bytes]:
    for chunk in answer.parts:
        # Chunks of a connection come one by one.
        await asyncio.sleep(0)
        yield chunk
    if answer.fault is not None:
        raise answer.fault
