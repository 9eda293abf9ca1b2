"""A stream let through while rules look at it: no text goes out while a match could still cover it."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from msgspec.structs import replace

from gateway import sse
from gateway.edits import Mask, masks_of, united, with_masks
from gateway.errors import ResponseBlocked
from gateway.wire import RESPONSES
from policies import Policy, run_validators
from validators import (
    JSON,
    MAX_FINDINGS,
    Choice,
    Exchange,
    Finding,
    OnFail,
    Outcome,
    Passage,
    Scan,
    Target,
    ToolCall,
)
from validators.normalise import Growing
from validators.scan import Sighting

#: How much text that cannot be settled a lane keeps before it gives up.
_LONGEST_TAIL = 65_536

#: What is not the answer itself, and what it is.
_ASIDES = {
    "refusal": Target.REFUSAL,
    "reasoning": Target.REASONING,
    "reasoning_content": Target.REASONING,
}
_TARGETS = {"arguments": Target.TOOL_ARGUMENTS, **_ASIDES}


def can_follow(endpoint: str, request: Mapping[str, JSON]) -> bool:
    """Whether a window can look at the answer to a request; speech is heard before its transcript comes."""
    modalities = request.get("modalities")
    speaks = isinstance(modalities, list) and "audio" in modalities
    return endpoint != RESPONSES and not speaks


class Window:
    """The checks of a policy that block or redact, at work on a stream (chat and completions).

    They decide as they would on the whole text: on a match once nothing that follows can change it. An event goes out when
    all that begins in it or before it is decided: at once, if the text does not end in what may be the beginning of a match.
    Only at the end can be told what matches in JSON, and how it is masked: arguments go out then, text that begins like
    JSON too if it may be masked, or from where something in it may match. What is held back of one text holds back no other.
    """

    def __init__(self, policy: Policy) -> None:
        self._checks = tuple(
            check
            for check in policy.checks
            if isinstance(check, Scan) and check.on_fail in (OnFail.BLOCK, OnFail.REDACT)
        )
        self._found: Counter[str] = Counter()
        self._lanes: dict[tuple[Any, ...], _Lane] = {}
        self._waiting: deque[_Waiting] = deque()

    def push(self, raw: bytes, event: sse.Event) -> list[bytes]:
        """Take in an event; the bytes that may go out now.

        Raises
        ------
        ResponseBlocked
            If a check with `on_fail: block` matches, could not run, or found more to mask than can be told, or if the
            answer is spoken.
        """
        chunk = orjson.loads(event.data) if event.data is not None else {}
        pieces = []
        for key, holder, name in _texts(chunk):
            lane = self._lanes.get(key) or self._new_lane(key)
            start = lane.length
            lane.add(holder[name])
            self._look(lane)
            pieces.append(_Piece(lane, start, lane.length, holder, name))
        waiting = _Waiting(raw, chunk, pieces)
        for lane in waiting.lanes:
            lane.waiting.append(waiting)
        self._waiting.append(waiting)
        return self._ready(waiting)

    def finish(self) -> list[bytes]:
        """The end of the stream: check what is left and let everything go. Raises `ResponseBlocked` as `push` does."""
        for lane in self._lanes.values():
            lane.ended = True
            self._look(lane)
        return [waiting.released() for waiting in self._waiting if not waiting.gone]

    def _ready(self, last: _Waiting) -> list[bytes]:
        """What may go out now that one more event has come."""
        ready: list[bytes] = []
        if not last.lanes and not last.is_ending:
            ready.append(last.released())
        touched = deque(last.lanes)
        while touched:
            queue = touched.popleft().waiting
            while queue and queue[0].may_go:
                touched += queue[0].lanes
                ready.append(queue[0].released())
        while self._waiting and (self._waiting[0].gone or self._waiting[0].may_end):
            first = self._waiting.popleft()
            if not first.gone:
                ready.append(first.released())
        return ready

    def _new_lane(self, key: tuple[Any, ...]) -> _Lane:
        target = _TARGETS.get(key[1], Target.TEXT)
        checks = tuple(check for check in self._checks if target in check.target)
        lane = self._lanes[key] = _Lane(target, checks)
        return lane

    def _look(self, lane: _Lane) -> None:
        """Decide on what can be decided, and mask or block accordingly."""
        for check, found in lane.look():
            if not found:
                continue
            if check.on_fail is OnFail.BLOCK:
                raise _stopped(f"the check {check.id}: {found[0].message}")
            self._found[check.id] += len(found)
            if self._found[check.id] >= MAX_FINDINGS:
                raise _stopped(f"the check {check.id}: more to mask than can be told")
            lane.mask(check, masks_of(found))


def _stopped(by: str) -> ResponseBlocked:
    return ResponseBlocked(f"The response was stopped by {by}.")


class _Lane:
    """One text that grows over a stream: an answer, a refusal, the arguments of one call. Offsets are from its start.

    Whatever begins before `settled` is decided, so the text before it may go out, masked as `masks` say. Each check goes
    its own pace: where one may begin to search anew, another may be in the middle of a match.
    """

    def __init__(self, target: Target, checks: tuple[Scan, ...]) -> None:
        self.length = 0
        self.settled = 0
        self.ended = False
        self.masks: list[Mask] = []
        self.waiting: deque[_Waiting] = deque()
        self._target = target
        self._checks = checks
        self._paces = [_Pace() for _ in checks]
        self._found: dict[str, list[Mask]] = {check.id: [] for check in checks}
        self._text: list[str] = []
        masks = any(check.on_fail is OnFail.REDACT for check in checks)
        self._is_held = masks or target is Target.TOOL_ARGUMENTS
        self._may_be_json: bool | None = None
        self._tail = ""
        self._tail_start = 0

    def add(self, text: str) -> None:
        """Let the text go on."""
        self.length += len(text)
        if not self._checks:
            return
        if self._may_be_json is None and (first := text.lstrip()[:1]):
            self._may_be_json = first in "{["
            if self._is_held and self._target is not Target.TOOL_ARGUMENTS:
                self._is_held = self._may_be_json
                self._tail = "".join(self._text)
        if self._may_be_json is not False or self._is_held:
            self._text.append(text)
        if not self._is_held:
            self._tail += text

    def look(self) -> Sequence[tuple[Scan, Sequence[Finding]]]:
        """What each check found that is decided since the last look; `settled` is moved on.

        Raises
        ------
        ResponseBlocked
            If a check could not run, or more must be kept than can be.
        """
        if not self._checks:
            self.settled = self.length
            return ()
        if not self._is_held:
            return self._follow()
        return self._search() if self.ended else ()

    def mask(self, check: Scan, masks: Sequence[Mask]) -> None:
        """Have these stretches replaced, because the check says so."""
        self._found[check.id] += masks
        self.masks = united(mask for found in self._found.values() for mask in found)

    def _search(self) -> list[tuple[Scan, Sequence[Finding]]]:
        """Look at the whole text, which has ended."""
        self.settled = self.length
        exchange = Exchange("chat", {}, (_choice(self._target, Passage("", "".join(self._text))),))
        results = run_validators(self._checks, exchange, lambda: 0.0)
        for check in self._checks:
            if results[check.id].outcome is Outcome.ERROR:
                raise _stopped(f"the check {check.id}, which could not run")
        return [(check, results[check.id].findings) for check in self._checks]

    def _follow(self) -> list[tuple[Scan, Sequence[Finding]]]:
        """Look at the end of the text, and forget what no decision to come can depend on."""
        at = self._tail_start
        json = self._may_be_json is not False
        text = Growing(self._tail, ended=self.ended, may_be_json=json)
        found: list[tuple[Scan, Sequence[Finding]]] = []
        for check, pace in zip(self._checks, self._paces, strict=True):
            text.start = pace.start - at
            sighting = _sighting(check, text)
            decided = max(pace.decided, sighting.decided + at)
            found.append((check, _moved(sighting.findings, at, range(pace.decided, decided))))
            pace.decided, pace.start = decided, sighting.start + at
        self.settled = min(pace.decided for pace in self._paces)
        begins = [f.span[0] for _, each in found for f in each if f.span is not None]
        if json and "\\" in self._tail and begins:
            self._is_held = True
            self.settled = min(self.settled, *begins)
            return self._search() if self.ended else []
        self._tail_start += text.context(min(pace.start for pace in self._paces) - at)
        self._tail = self._tail[self._tail_start - at :]
        if len(self._tail) > _LONGEST_TAIL:
            raise _stopped(
                "its own text, which hides so much that it cannot be checked as a stream"
            )
        return found


@dataclass(slots=True)
class _Pace:
    """How far a check is: what begins before `decided` is decided, and it searches on from `start`."""

    decided: int = 0
    start: int = 0


def _sighting(check: Scan, text: Growing) -> Sighting:
    try:
        sighting = check.follow(text, "")
    except Exception as error:
        raise _stopped(f"the check {check.id}, which could not run") from error
    if sighting.flooded:
        raise _stopped(f"the check {check.id}: more found than can be told")
    return sighting


def _moved(findings: Sequence[Finding], by: int, begin: range) -> list[Finding]:
    """The findings moved behind `by` characters more, of those that then begin there."""
    return [
        replace(finding, span=(finding.span[0] + by, finding.span[1] + by))
        for finding in findings
        if finding.span is not None and finding.span[0] + by in begin
    ]


@dataclass(slots=True)
class _Piece:
    """A text of an event, `holder[name]`, and which stretch of its lane it is."""

    lane: _Lane
    start: int
    end: int
    holder: dict[str, Any]
    name: str


class _Waiting:
    """An event not yet let go: its bytes, what they say, and its texts."""

    def __init__(self, raw: bytes, chunk: dict[str, Any], pieces: list[_Piece]) -> None:
        self.lanes = list(dict.fromkeys(piece.lane for piece in pieces))
        self.gone = False
        self._raw = raw
        self._chunk = chunk
        self._pieces = pieces

    @property
    def is_ending(self) -> bool:
        """Whether it says that something is over, so that nothing may come after it that came before it."""
        choices = self._chunk.get("choices")
        return any(c.get("finish_reason") for c in choices) if choices else bool(self._chunk)

    @property
    def may_go(self) -> bool:
        """Whether it is its texts' turn, all that begins in them is decided, and it may overtake others."""
        return self._is_settled and not self.is_ending

    @property
    def may_end(self) -> bool:
        """Whether it may go, given that it is the first of all."""
        return self._is_settled and self.is_ending

    @property
    def _is_settled(self) -> bool:
        return all(p.end <= p.lane.settled and p.lane.waiting[0] is self for p in self._pieces)

    def released(self) -> bytes:
        """The event as its client may see it; it is no longer waiting."""
        self.gone = True
        for lane in self.lanes:
            lane.waiting.popleft()
        changed = False
        for piece in self._pieces:
            text = piece.holder[piece.name]
            piece.holder[piece.name] = with_masks(text, piece.lane.masks, piece.start)
            changed = changed or piece.holder[piece.name] != text
        if not changed:
            return self._raw
        for choice in self._chunk["choices"]:
            if "logprobs" in choice:
                choice["logprobs"] = None
        return sse.encode(orjson.dumps(self._chunk))


def _texts(chunk: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], str]]:
    """Every text in a chunk: the lane it belongs to, and where it stands."""
    for choice in chunk.get("choices") or ():
        index = choice.get("index") or 0
        said = choice.get("delta") or choice.get("message") or {}
        if said.get("audio"):
            raise _stopped("its speech; `stream: buffer` can check that")
        for lane, number, holder, name in _holders(choice, said):
            if isinstance(holder.get(name), str) and holder[name]:
                yield (index, lane, number), holder, name


def _holders(
    choice: dict[str, Any], said: dict[str, Any]
) -> Iterator[tuple[str, Any, dict[str, Any], str]]:
    yield "text", None, choice, "text"
    for name in ("content", *_ASIDES):
        yield name, None, said, name
    if isinstance(parts := said.get("content"), list):
        yield from (
            ("content", None, part, name) for part in parts for name in ("text", "transcript")
        )
        yield from (("refusal", None, part, "refusal") for part in parts)
    for call in said.get("tool_calls") or ():
        number = object() if call.get("index") is None else call["index"]
        for kind in ("function", "custom"):
            function = call.get(kind) or {}
            yield from (("arguments", number, function, name) for name in ("arguments", "input"))
    if function := said.get("function_call"):
        yield from (("arguments", "call", function, name) for name in ("arguments", "input"))


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
