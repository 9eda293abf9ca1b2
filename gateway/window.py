"""A stream let through while rules look at it: no text goes out while a match could still cover it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from gateway import sse
from gateway.errors import ResponseBlocked
from gateway.wire import Mask, masks_of, united, with_masks
from policies import Policy, Stage, run_stage
from validators import (
    JSON,
    MAX_FINDINGS,
    Choice,
    Exchange,
    Malformed,
    OnFail,
    Outcome,
    Passage,
    Scan,
    Target,
    ToolCall,
)
from validators.normalise import View, views

#: How much text that cannot be settled a lane keeps before it gives up; a longer piece is taken in by slices.
_LONGEST_TAIL = 65_536
_SLICE_CHARS = 32_768

#: The longest beginning of an escape that is not whole yet: `\ud83d\ude0` (RFC 8259, section 7).
_OPEN_ESCAPE_CHARS = 11

#: What is not the answer itself, and what it is.
_ASIDES = {
    "refusal": Target.REFUSAL,
    "reasoning": Target.REASONING,
    "reasoning_content": Target.REASONING,
}
_TARGETS = {"arguments": Target.TOOL_ARGUMENTS, **_ASIDES}


class Window:
    """The checks of a policy that block or redact, at work on a stream (chat and completions).

    They decide as they would on the whole text: on a match once nothing that follows can change it. An event goes out when
    all that begins in it or before it is decided, which is when one character more than the longest match has followed.
    Text that is JSON, or begins like it, goes out at its end, because only then can be told what matches in it.
    """

    def __init__(self, policy: Policy) -> None:
        self._checks = tuple(
            check
            for check in policy.checks
            if isinstance(check, Scan) and check.on_fail in (OnFail.BLOCK, OnFail.REDACT)
        )
        self._stage = Stage.model_construct(name="window", checks=self._checks)
        self._found: Counter[str] = Counter()
        self._lanes: dict[tuple[Any, ...], _Lane] = {}
        self._waiting: deque[_Waiting] = deque()

    def push(self, raw: bytes, event: sse.Event) -> list[bytes]:
        """Take in an event; the bytes that may go out now.

        Raises
        ------
        ResponseBlocked
            If a check with `on_fail: block` matches, could not run, or found more to mask than can be told.
        """
        chunk = orjson.loads(event.data) if event.data is not None else {}
        pieces = []
        for key, holder, name in _texts(chunk):
            lane = self._lanes.get(key) or self._new_lane(key)
            start, text = lane.length, holder[name]
            for at in range(0, len(text), _SLICE_CHARS):
                lane.add(text[at : at + _SLICE_CHARS])
                self._look(lane, ended=False)
            pieces.append(_Piece(lane, start, lane.length, holder, name))
        self._waiting.append(_Waiting(raw, chunk, pieces))
        ready = []
        while self._waiting and self._waiting[0].is_settled:
            ready.append(self._waiting.popleft().released())
        return ready

    def finish(self) -> list[bytes]:
        """The end of the stream: check what is left and let everything go. Raises `ResponseBlocked` as `push` does."""
        for lane in self._lanes.values():
            self._look(lane, ended=True)
        return [self._waiting.popleft().released() for _ in range(len(self._waiting))]

    def _new_lane(self, key: tuple[Any, ...]) -> _Lane:
        target = _TARGETS.get(key[1], Target.TEXT)
        widths = [check.longest_match or 0 for check in self._checks if target in check.target]
        lane = self._lanes[key] = _Lane(target, max(widths, default=None))
        return lane

    def _look(self, lane: _Lane, *, ended: bool) -> None:
        """Decide on what can be decided, and mask or block accordingly."""
        passage = lane.passage(ended=ended)
        if passage is None:
            return
        decided = lane.settle(passage, ended=ended)
        exchange = Exchange("chat", {}, (_choice(lane.target, passage),))
        results = run_stage(self._stage, exchange, lambda: 0.0)
        new: list[Mask] = []
        for check in self._checks:
            result = results[check.id]
            if result.outcome is Outcome.ERROR:
                raise _stopped(f"the check {check.id}, which could not run")
            found = [f for f in result.findings if f.span is not None and f.span[0] in decided]
            if found and check.on_fail is OnFail.BLOCK:
                raise _stopped(f"the check {check.id}: {found[0].message}")
            self._found[check.id] += len(found)
            if max(len(result.findings), self._found[check.id]) >= MAX_FINDINGS:
                raise _stopped(f"the check {check.id}: more to mask than can be told")
            new += masks_of(found)
        lane.mask(new)
        if not ended:
            lane.trim(passage)


def _stopped(by: str) -> ResponseBlocked:
    return ResponseBlocked(f"The response was stopped by {by}.")


class _Stretch(Passage):
    """Part of a longer text: even if it looks like JSON it is no document of its own."""

    __slots__ = ()

    def parsed(self) -> JSON:
        """Raise `Malformed`."""
        raise Malformed("part of a longer text")


class _Lane:
    """One text that grows over a stream: an answer, a refusal, the arguments of one call. Offsets are from its start.

    Whatever begins before `settled` is decided, so the text before it may go out, masked as `masks` say. `width` is the
    length of the longest match; None if no check looks at this text.
    """

    def __init__(self, target: Target, width: int | None) -> None:
        self.target = target
        self.length = 0
        self.settled = 0
        self.masks: list[Mask] = []
        self._width = width
        self._tail = ""
        self._tail_start = 0
        self._whole: list[str] | None = [] if target is Target.TOOL_ARGUMENTS else None
        self._begun = False

    def add(self, text: str) -> None:
        """Let the text go on."""
        self.length += len(text)
        if self._width is None:
            self.settled = self.length
        elif self._whole is not None:
            self._whole.append(text)
        else:
            self._tail += text
            if not self._begun and (first := self._tail.lstrip()[:1]):
                self._begun = True
                self._whole = [self._tail] if first in "{[" else None

    def passage(self, *, ended: bool) -> Passage | None:
        """What checks are to look at; None if they need not, or cannot yet."""
        if self._width is None or not (self._begun or ended):
            return None
        if self._whole is None:
            return _Stretch("", self._tail)
        return Passage("", "".join(self._whole)) if ended else None

    def settle(self, passage: Passage, *, ended: bool) -> range:
        """Settle what can be settled; where in the passage that begins and ends which is settled now."""
        before = self.settled
        sure = self.length if ended else self._tail_start + self._seen_before(passage, 0)
        self.settled = max(before, sure)
        return range(before - self._tail_start, self.settled - self._tail_start)

    def mask(self, masks: Sequence[Mask]) -> None:
        """Have these stretches of the passage replaced."""
        at = self._tail_start
        moved = ((start + at, end + at, replacement) for start, end, replacement in masks)
        self.masks = united([*self.masks, *moved])

    def trim(self, passage: Passage) -> None:
        """Forget what no decision to come can depend on.

        Searching from a cut finds the same as searching from the start, if there is room behind it for two matches and no
        match in it. One may seem to begin there for want of what stands before the cut, and hide the beginning of another.

        Raises
        ------
        ResponseBlocked
            If too much must be kept, because the text hides most of its characters.
        """
        assert self._width is not None
        context = 2 * (self._width + 2)
        if len(self._tail) < 2 * context:
            return
        cut = self._seen_before(passage, context)
        is_clear = not self.masks or self.masks[-1][1] <= self._tail_start + cut
        if cut and is_clear and _folds_apart(passage, cut):
            self._tail_start += cut
            self._tail = self._tail[cut:]
        elif len(self._tail) > _LONGEST_TAIL + 2 * MAX_FINDINGS * context:
            raise _stopped(
                "its own text, which hides so much that it cannot be checked as a stream"
            )

    def _seen_before(self, passage: Passage, chars: int) -> int:
        """Up to where in the passage at least so many characters and a match are seen to follow."""
        assert self._width is not None
        opened = passage.text.find("\\", max(len(passage.text) - _OPEN_ESCAPE_CHARS, 0))
        # An escape that is not whole yet would count as more characters than the one it becomes.
        seen = passage.views() if opened < 0 else views(passage.text[:opened], is_json=False)
        return min(_offset(view, len(view.text) - chars - self._width - 1) for view in seen)


def _offset(view: View, index: int) -> int:
    """Where in the text as written the character of a view stands; 0 for one before the first."""
    return view.original(index, index + 1)[0] if index > 0 else 0


def _folds_apart(passage: Passage, cut: int) -> bool:
    """Whether the parts before and behind a cut read as they do together."""
    apart = (
        views(part, is_json=False)[-1].text for part in (passage.text[:cut], passage.text[cut:])
    )
    return passage.views()[-1].text == "".join(apart)


@dataclass(slots=True)
class _Piece:
    """A text of an event, `holder[name]`, and which stretch of its lane it is."""

    lane: _Lane
    start: int
    end: int
    holder: dict[str, Any]
    name: str


@dataclass(slots=True)
class _Waiting:
    """An event not yet let go: its bytes, what they say, and its texts."""

    raw: bytes
    chunk: dict[str, Any]
    pieces: list[_Piece]

    @property
    def is_settled(self) -> bool:
        """Whether all that begins in its texts is decided."""
        return all(piece.end <= piece.lane.settled for piece in self.pieces)

    def released(self) -> bytes:
        """The event as its client may see it."""
        changed = False
        for piece in self.pieces:
            text = piece.holder[piece.name]
            piece.holder[piece.name] = with_masks(text, piece.lane.masks, piece.start)
            changed = changed or piece.holder[piece.name] != text
        if not changed:
            return self.raw
        for choice in self.chunk["choices"]:
            if "logprobs" in choice:
                choice["logprobs"] = None
        return sse.encode(orjson.dumps(self.chunk))


def _texts(chunk: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], str]]:
    """Every text in a chunk: the lane it belongs to, and where it stands."""
    for choice in chunk.get("choices") or ():
        index = int(choice.get("index") or 0)
        said = choice.get("delta") or choice.get("message") or {}
        content = said.get("content")
        parts = content if isinstance(content, list) else ()
        calls = [
            (object() if call.get("index") is None else call["index"], call.get(kind))
            for call in said.get("tool_calls") or ()
            for kind in ("function", "custom")
        ]
        called = [
            ("arguments", number, function or {}, name)
            for number, function in [*calls, ("call", said.get("function_call"))]
            for name in ("arguments", "input")
        ]
        holders = [
            ("text", None, choice, "text"),
            *((name, None, said, name) for name in ("content", *_ASIDES)),
            *(("content", None, part, "text") for part in parts),
            *(("refusal", None, part, "refusal") for part in parts),
            *called,
        ]
        for lane, number, holder, name in holders:
            if isinstance(holder.get(name), str):
                yield (index, lane, number), holder, name


def _choice(target: Target, passage: Passage) -> Choice:
    match target:
        case Target.TOOL_ARGUMENTS:
            return Choice("", tool_calls=(ToolCall("", passage),))
        case Target.REFUSAL:
            return Choice("", refusals=(passage,))
        case Target.REASONING:
            return Choice("", reasonings=(passage,))
        case Target.TEXT:
            return Choice("", texts=(passage,))
