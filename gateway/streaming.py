"""Streamed responses: collected whole, or let through while they are checked.

`buffer` is `collect`; `observe` and `window` are `relay`, the second with a `Window` in the way. Either way the decision is
durable before the client hears the end of the stream.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway import sse
from gateway.errors import GatewayError, ResponseBlocked, UpstreamError
from gateway.ports import UpstreamResponse
from gateway.wire import RESPONSES, Unreadable
from policies import Policy, Stage, run_stage
from validators import (
    MAX_FINDINGS,
    AnyValidator,
    Choice,
    Exchange,
    Finding,
    Forbid,
    OnFail,
    Outcome,
    Passage,
    Pii,
    Redact,
    Secrets,
    ToolCall,
)
from validators.normalise import views

#: How much text that checks see as little a window keeps before it gives up.
_LONGEST_TAIL = 65_536


@dataclass(slots=True)
class Collected:
    """A stream as it came.

    `fault` says what was wrong with it: `error`, `truncated`, `unreadable`; `blocked` if a check stopped it; None if nothing.
    """

    assembler: sse.Assembler
    events: list[sse.Event] = field(default_factory=list)
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

    def replay(self, *, strip: bool) -> bytes:
        """The events as bytes, without the logprobs nobody asked for if `strip`, and ended as the endpoint ends."""
        endpoint = self.assembler.endpoint
        parts = [sse.event_without_logprobs(endpoint, e) if strip else e.raw for e in self.events]
        return b"".join((*parts, self.ending))

    @property
    def ending(self) -> bytes:
        """The `[DONE]` that the provider left out."""
        return b"" if self.assembler.endpoint == RESPONSES or self.assembler.done else sse.DONE


async def collect(response: UpstreamResponse, endpoint: str, limit_bytes: int) -> Collected:
    """The whole stream; whatever goes wrong with it is a `fault`, and what came before is kept.

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
                    collected.events.append(event)
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
                    raise _too_long(self.limit_bytes)
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
        if self.window is not None and assembler.repeats and collected.fault is None:
            collected.fault = "unreadable"
            collected.message = "The chunks say their text twice; `stream: buffer` can check that."
        if collected.fault is not None:
            if not self.lenient:
                raise UpstreamError(collected.message, code=f"upstream_{collected.fault}")
            return [] if event.is_done else [event.raw]
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


@dataclass(slots=True)
class _Lane:
    """One text that grows over a stream: an answer, a refusal, the arguments of one call. Offsets are from its start."""

    is_json: bool
    tail: str = ""
    tail_start: int = 0
    redactions: list[tuple[int, int, str]] = field(default_factory=list)

    def mask(self, start: int, end: int, replacement: str) -> bool:
        """Have this stretch replaced, together with what is masked already and overlaps it; False if none does."""
        touched = [each for each in self.redactions if each[0] < end and start < each[1]]
        united = (
            min([start, *(left for left, _, _ in touched)]),
            max([end, *(right for _, right, _ in touched)]),
            min(touched)[2] if touched else replacement,
        )
        self.redactions = [each for each in self.redactions if each not in touched] + [united]
        return not touched

    @property
    def length(self) -> int:
        """How long the text is so far."""
        return self.tail_start + len(self.tail)

    def seen_after(self, offset: int) -> int:
        """How many characters a check sees behind an offset; hidden characters and escapes may be far more than they seem."""
        after = self.tail[max(offset - self.tail_start, 0) :]
        return min(len(view.text) for view in views(after, is_json=self.is_json))


@dataclass(slots=True)
class _Waiting:
    """An event not yet let go: its bytes, and which part of which lane each of its texts is."""

    raw: bytes
    chunk: dict[str, Any]
    pieces: list[tuple[_Lane, int, int, dict[str, Any], str]]

    @property
    def is_ending(self) -> bool:
        """Whether it says that something is over, so that nothing may come after it that came before it."""
        choices = self.chunk.get("choices")
        return any(c.get("finish_reason") for c in choices) if choices else bool(self.chunk)


class Window:
    """The checks of a policy at work on a stream (chat and completions).

    The checks see the growing text in slices that overlap by the length of the longest possible match on both sides: every
    match is seen whole, is believed once the text goes on behind it, and no character goes out while a match could still
    begin at or before it. What is held back of one text holds back no other: reasoning that has ended waits for the end of
    the stream, the answer after it does not.
    """

    def __init__(self, policy: Policy) -> None:
        acting = [
            check for check in policy.checks if check.on_fail in (OnFail.BLOCK, OnFail.REDACT)
        ]
        scanning = [check for check in acting if isinstance(check, Forbid | Redact | Secrets | Pii)]
        self._stage = Stage(name="window", checks=tuple(scanning))
        self._width = max(check.longest_match or 0 for check in scanning)
        self._masked: Counter[str] = Counter()
        self._lanes: dict[tuple[Any, ...], _Lane] = {}
        self._waiting: list[_Waiting] = []

    def push(self, raw: bytes, event: sse.Event) -> list[bytes]:
        """Take in an event; the bytes that may go out now.

        Raises
        ------
        ResponseBlocked
            If a check with `on_fail: block` matches.
        """
        chunk = orjson.loads(event.data) if event.data is not None else {}
        pieces = []
        for key, holder, name in _texts(chunk):
            if not holder[name]:
                continue
            lane = self._lanes.setdefault(key, _Lane(is_json=key[1] == "arguments"))
            start = lane.length
            lane.tail += holder[name]
            pieces.append((lane, start, lane.length, holder, name))
            self._check(key, lane, ended=False)
        self._waiting.append(_Waiting(raw, chunk, pieces))
        return self._release()

    def finish(self) -> list[bytes]:
        """The end of the stream: check what is left and let everything go. Raises `ResponseBlocked` as `push` does."""
        for key, lane in self._lanes.items():
            self._check(key, lane, ended=True)
        return [_released(waiting) for waiting in self._waiting]

    def _release(self) -> list[bytes]:
        ready: list[bytes] = []
        kept: list[_Waiting] = []
        stalled: set[int] = set()
        for waiting in self._waiting:
            lanes = {id(lane) for lane, *_ in waiting.pieces}
            if (kept and waiting.is_ending) or lanes & stalled or not self._may_go(waiting):
                kept.append(waiting)
                stalled |= lanes
            else:
                ready.append(_released(waiting))
        self._waiting = kept
        return ready

    def _may_go(self, waiting: _Waiting) -> bool:
        return all(lane.seen_after(end) > self._width for lane, _, end, _, _ in waiting.pieces)

    def _check(self, key: tuple[Any, ...], lane: _Lane, *, ended: bool) -> None:
        results = run_stage(
            self._stage, Exchange("chat", {}, (_choice(key, lane.tail),)), lambda: 0.0
        )
        for check in self._stage.checks:
            result = results[check.id]
            if result.outcome is Outcome.ERROR:
                raise ResponseBlocked(
                    f"The check {check.id} could not run on this stream, so it ends here."
                )
            for finding in result.findings:
                if finding.span is None:
                    continue
                # What begins at a cut was seen before with the text in front of it, which may say that it is no match.
                begun = finding.span[0] > 0 or lane.tail_start == 0
                if begun and (ended or finding.span[1] < len(lane.tail)):
                    self._act(check, finding.span, finding, lane)
        self._trim(lane)

    def _act(
        self, check: AnyValidator, span: tuple[int, int], finding: Finding, lane: _Lane
    ) -> None:
        if check.on_fail is OnFail.BLOCK:
            raise ResponseBlocked(
                f"The response was stopped by the check {check.id}: {finding.message}."
            )
        start, end = span[0] + lane.tail_start, span[1] + lane.tail_start
        if lane.mask(start, end, finding.replacement or "[redacted]"):
            self._masked[check.id] += 1
        if self._masked[check.id] >= MAX_FINDINGS:
            raise ResponseBlocked(
                f"The check {check.id} found more to mask than can be told, so the response ends here."
            )

    def _trim(self, lane: _Lane) -> None:
        keep = 2 * self._width + 2
        if lane.seen_after(lane.length - keep) >= keep:
            lane.tail_start += max(len(lane.tail) - keep, 0)
            lane.tail = lane.tail[-keep:]
        elif len(lane.tail) > _LONGEST_TAIL + keep:
            raise ResponseBlocked(
                "The response hides so much of its text that it cannot be checked as a stream."
            )


def _texts(chunk: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], str]]:
    """Every piece of text in a chunk: the lane it belongs to, and where it stands."""
    for choice in chunk.get("choices") or ():
        index = choice.get("index", 0)
        if isinstance(choice.get("text"), str):
            yield (index, "text"), choice, "text"
        delta = choice.get("delta") or {}
        for name in ("content", "refusal", "reasoning_content", "reasoning"):
            if isinstance(delta.get(name), str):
                yield (index, name), delta, name
        content = delta.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                yield (index, "content"), part, "text"
        calls = [
            (call.get("index", 0), call.get(kind))
            for call in delta.get("tool_calls") or ()
            for kind in ("function", "custom")
        ]
        for number, function in [*calls, ("call", delta.get("function_call"))]:
            for name in ("arguments", "input"):
                if isinstance(function, dict) and isinstance(function.get(name), str):
                    yield (index, "arguments", number), function, name


def _choice(key: tuple[Any, ...], text: str) -> Choice:
    passage = Passage(f"choices[{key[0]}].{key[1]}", text)
    if key[1] == "arguments":
        return Choice(passage.path, tool_calls=(ToolCall("", passage),))
    if key[1] == "refusal":
        return Choice(passage.path, refusals=(passage,))
    if key[1] in ("reasoning_content", "reasoning"):
        return Choice(passage.path, reasonings=(passage,))
    return Choice(passage.path, texts=(passage,))


def _released(waiting: _Waiting) -> bytes:
    changed = False
    for lane, start, end, holder, name in waiting.pieces:
        text = holder[name]
        for left, right, replacement in sorted(lane.redactions, reverse=True):
            if left < end and right > start:
                shown = replacement if left >= start else ""
                text = (
                    text[: max(left - start, 0)] + shown + text[max(min(right, end) - start, 0) :]
                )
                changed = True
        holder[name] = text
    if not changed:
        return waiting.raw
    for choice in waiting.chunk["choices"]:
        if "logprobs" in choice:
            choice["logprobs"] = None
    return sse.encode(orjson.dumps(waiting.chunk))
