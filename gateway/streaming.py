"""Streamed responses: collected whole, or let through while they are checked.

`buffer` is `collect`; `observe` and `window` are `relay`, the second with a `Window` in the way. Either way the decision is
durable before the client hears the end of the stream.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from gateway import sse
from gateway.errors import GatewayError, ResponseBlocked, UpstreamError
from gateway.ports import UpstreamResponse
from gateway.window import Window
from gateway.wire import RESPONSES, Unreadable


@dataclass(slots=True)
class Collected:
    """A stream as it came. `said` is its events, one after the other, as their client may see them, if they are kept.

    `fault` says what was wrong with it: `error`, `truncated`, `unreadable`, `response_too_large`; `blocked` if a check
    stopped it; None if nothing.
    """

    assembler: sse.Assembler
    said: bytearray = field(default_factory=bytearray)
    fault: str | None = None
    message: str = ""

    def add(self, event: sse.Event) -> None:
        """Take in one event; after one that cannot be read the rest is not looked at, but for its end."""
        if self.fault is None:
            try:
                self.assembler.add(event)
            except Unreadable as error:
                self.fault, self.message = "unreadable", str(error)
        elif event.is_done:
            self.assembler.done = True

    def check(self) -> None:
        """Set `fault` if the stream ended with an error, or before the answer did."""
        if self.assembler.error is not None:
            self.fault = "error"
            self.message = str(
                self.assembler.error.get("message") or "The provider reported an error."
            )
        elif self.fault is None and not self.assembler.complete:
            self.fault, self.message = (
                "truncated",
                "The provider's stream ended before the answer did.",
            )

    def replay(self) -> bytes:
        """What was said, ended as the endpoint ends."""
        return b"".join((self.said, self.ending))

    @property
    def ending(self) -> bytes:
        """The `[DONE]` that the provider left out."""
        return b"" if self.assembler.endpoint == RESPONSES or self.assembler.done else sse.DONE


async def collect(
    response: UpstreamResponse, endpoint: str, limit_bytes: int, *, strip: bool
) -> Collected:
    """The whole stream; whatever goes wrong with it is a `fault`, and what came before is kept.

    `strip` keeps logprobs that the client did not ask for out of what was `said`.

    Raises
    ------
    UpstreamError
        If it is longer than `limit_bytes`.
    """
    collected = Collected(sse.Assembler(endpoint))
    splitter = sse.Splitter()
    size_bytes = 0
    try:
        async for chunk in response.iter_chunks():
            size_bytes += len(chunk)
            if size_bytes > limit_bytes:
                raise _too_long(limit_bytes)
            for event in splitter.feed(chunk):
                if not collected.assembler.done:
                    collected.add(event)
                    collected.said += (
                        sse.event_without_logprobs(endpoint, event) if strip else event.raw
                    )
    except UpstreamError as error:
        if error.code == "upstream_response_too_large":
            raise
        collected.fault, collected.message = "truncated", error.message
    collected.check()
    return collected


#: Makes the decision on a stream durable, and says what to tell the client instead of a good end, if anything.
Conclude = Callable[[Collected], Awaitable[GatewayError | None]]


@dataclass(slots=True)
class Relay:
    """A stream let through as the provider paces it, its end held back until the decision is durable.

    With a `window`, text is held back for as long as a match could still grow over it; a match that blocks ends the stream
    with an error event and none of it was sent. `strip` removes logprobs that the client did not ask for. An event that
    cannot be read ends the stream too, unless it is `lenient`.
    """

    response: UpstreamResponse
    collected: Collected
    strip: bool
    window: Window | None
    limit_bytes: int
    lenient: bool
    conclude: Conclude
    _last: list[bytes] = field(default_factory=list)

    async def events(self) -> AsyncGenerator[bytes]:
        """What the client gets, in pieces as they come."""
        error: GatewayError | None = None
        try:
            async for part in self._parts():
                yield part
        except UpstreamError as fault:
            error = fault
            if self.collected.fault is None:
                self.collected.fault, self.collected.message = "truncated", fault.message
        except ResponseBlocked as blocked:
            error = blocked
            self.collected.fault, self.collected.message = "blocked", blocked.message
        error = await self.conclude(self.collected) or error
        if error is not None:
            yield sse.error_events(self.collected.assembler.endpoint, error)
        else:
            yield b"".join((*self._last, self.collected.ending))

    async def _parts(self) -> AsyncGenerator[bytes]:
        splitter = sse.Splitter()
        size_bytes = 0
        async with self.response:
            async for chunk in self.response.iter_chunks():
                size_bytes += len(chunk)
                if size_bytes > self.limit_bytes:
                    error = _too_long(self.limit_bytes)
                    self.collected.fault = "response_too_large"
                    self.collected.message = error.message
                    raise error
                ready: list[bytes] = []
                try:
                    for event in splitter.feed(chunk):
                        ready += self._take(event)
                finally:
                    # What came before an event that ends the stream goes out all the same.
                    if ready:
                        yield b"".join(ready)
        if self.window is not None:
            yield b"".join(self.window.finish())

    def _take(self, event: sse.Event) -> list[bytes]:
        """Note an event down, and say what may go out now."""
        collected, assembler = self.collected, self.collected.assembler
        if assembler.done:
            return []
        collected.add(event)
        if self.window is not None and assembler.says_more and collected.fault is None:
            collected.fault = "unreadable"
            collected.message = "The chunks say their text twice; `stream: buffer` can check that."
        if collected.fault is not None and not event.is_done:
            if not self.lenient:
                raise UpstreamError(collected.message, code=f"upstream_{collected.fault}")
            return [event.raw]
        raw = sse.event_without_logprobs(assembler.endpoint, event) if self.strip else event.raw
        if event.is_done or (assembler.endpoint == RESPONSES and assembler.complete):
            self._last.append(raw)
            return []
        return [raw] if self.window is None else self.window.push(raw, event)


def _too_long(limit_bytes: int) -> UpstreamError:
    return UpstreamError(
        f"The provider's stream is longer than {limit_bytes} bytes (limits.response_bytes).",
        code="upstream_response_too_large",
    )
