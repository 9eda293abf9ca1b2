"""What the script says, before any dialect: tokens, their logprobs, choices piece by piece."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import msgspec

from gateway.demo.script import Script

Object: TypeAlias = dict[str, Any]

#: Stands in the text for what `fault: invalid_utf8` puts into the bytes.
NOT_UTF8 = "\ue000"
MAX_TOP_LOGPROBS = 20

_ASTRAL = "\U00010000-\U0010ffff"
_TOKEN = re.compile(rf"[{_ASTRAL}]| ?[^\W{_ASTRAL}]{{1,7}}|[^\w ]| ")
_ALTERNATIVES = (
    *(" the", " a", " not", " no", "The", "I", " is", " was", ".", ",", "\n", " to", " only"),
    *(" and", " or", " one", " all", " it", " we", " may", " 1", " 30", " yes", '"'),
)
_SLICE = 65_536


class Token(NamedTuple):
    """A token: the text it adds to a stream, how it is written in logprobs, and its bytes.

    A character above U+FFFF comes as two tokens, of which the first adds no text, as it does from
    byte-level vocabularies.
    """

    delta: str
    label: str
    raw: bytes


_NOTHING = Token("", "", b"")


def tokenize(text: str) -> list[Token]:
    """Tokens whose deltas and whose bytes, joined, are `text`."""
    tokens = []
    for piece in _TOKEN.findall(text):
        raw = piece.encode()
        if len(piece) == 1 and len(raw) == 4:
            first, second = (
                "".join(f"\\x{byte:02x}" for byte in half) for half in (raw[:2], raw[2:])
            )
            tokens += [Token("", first, raw[:2]), Token(piece, second, raw[2:])]
        else:
            tokens.append(Token(piece, piece, raw))
    return tokens


def logprob_entries(
    tokens: Sequence[Token], certainty: float, top: int, *, constant: bool = False
) -> list[Object]:
    """An entry for each token with its `top` likeliest alternatives; the same every time.

    Roughly every second word and every number is decisive: its probability lies around `certainty`.
    What lies between is nearly certain, as scaffolding is. With `constant` every logprob is 0.
    """
    return [_entry(place, token, certainty, top, constant) for place, token in enumerate(tokens)]


def _entry(place: int, token: Token, certainty: float, top: int, constant: bool) -> Object:
    digest = hashlib.sha256(f"{place}:{token.label}".encode()).digest()
    chance, weight = digest[0] / 256, digest[1] / 256
    word = token.label.strip()
    decisive = word.isdecimal() or (word.isalpha() and chance < 0.5)
    doubt = (1 - certainty) * (0.6 + 0.6 * weight if decisive else 0.03 * weight)
    probability = min(max(1 - doubt, 1e-4), 1 - 2e-6 * (1 + weight))
    chosen = [(token.label, token.raw, 0.0 if constant else math.log(probability))]
    others = _alternatives(word, token.label, digest[2]) if top else ()
    rest = 1 - probability
    for rank, other in enumerate(itertools.islice(others, top)):
        likelihood = math.log(max(rest * 0.6 * 0.4**rank, 1e-9))
        chosen.append((other, other.encode(), -20.0 - rank if constant else likelihood))
    tops = sorted(chosen, key=lambda option: -option[2])[:top]
    return _logprob(*chosen[0]) | {"top_logprobs": [_logprob(*option) for option in tops]}


def _logprob(label: str, raw: bytes, logprob: float) -> Object:
    return {"token": label, "bytes": list(raw), "logprob": round(logprob, 8)}


def _alternatives(word: str, label: str, start: int) -> Iterator[str]:
    if word.isdecimal():
        lead, size = label[: -len(word)], len(word)
        yield from (f"{lead}{(int(word) + step) % 10**size:0{size}}" for step in range(1, 10))
    for step in range(len(_ALTERNATIVES)):
        other = _ALTERNATIVES[(start + step) % len(_ALTERNATIVES)]
        if other != label:
            yield other


class Step(NamedTuple):
    """A piece of a choice in the making.

    `kind` is reasoning, text, refusal or call; `entries` are its logprobs; `delta` is text, save
    where the wrong type is sent on purpose; `call` is the position of the tool call.
    """

    kind: str
    delta: Any
    entries: list[Object]
    call: int = 0


class Call(msgspec.Struct, frozen=True):
    """A tool call of a choice."""

    id: str
    name: str
    arguments: str


class Said(msgspec.Struct, frozen=True):
    """One choice, whatever the dialect.

    `steps` are its pieces in order; `logprobs` all their entries, None where there are none to
    give.
    """

    index: int
    content: Any
    refusal: str | None
    reasoning: str | None
    calls: tuple[Call, ...]
    finish_reason: str
    steps: tuple[Step, ...]
    logprobs: list[Object] | None


class Ask(msgspec.Struct, frozen=True):
    """A request, the script that steers its answer, and what is different every time.

    `suffix` makes the ids; `created` is in seconds since the epoch.
    """

    request: Mapping[str, Any]
    script: Script
    suffix: str
    created: int

    @property
    def model(self) -> str:
        """The model asked for."""
        return str(self.request.get("model", ""))

    def say(self, count: int, *, logprobs: bool, top: int) -> list[Said]:
        """The `count` choices the script asks for, at least one for each of its `texts`."""
        count = max(1, count, len(self.script.texts))
        return [self._say(index, logprobs=logprobs, top=top) for index in range(min(count, 128))]

    def _say(self, index: int, *, logprobs: bool, top: int) -> Said:
        script = self.script
        content: Any = self._text(index)
        tokens = self._tokens(content)
        refusal = tokenize(script.refusal or "")
        calls = tuple(
            Call(f"call_{self.suffix}{index}{place}", call.name, call.text)
            for place, call in enumerate(script.tool_calls)
        )
        arguments = [tokenize(call.arguments) for call in calls]
        every = [*tokens, *refusal, *itertools.chain.from_iterable(arguments)]
        entries = self._entries(every, top) if logprobs else []
        supply = iter(entries)
        steps = [Step("reasoning", token.delta, []) for token in tokenize(script.reasoning or "")]
        steps += _steps("text", tokens or [_NOTHING] * (content == ""), supply)
        steps += _steps("refusal", refusal, supply)
        for place, pieces in enumerate(arguments):
            steps += _steps("call", pieces or [_NOTHING], supply, call=place)
        if steps and (surplus := list(supply)):
            steps[-1] = steps[-1]._replace(entries=[*steps[-1].entries, *surplus])
        if script.fault == "wrong_type":
            content, steps = 42, [Step("text", 42, [])]
        return Said(
            index=index,
            content=content,
            refusal=script.refusal,
            reasoning=script.reasoning,
            calls=calls,
            finish_reason=script.finish_reason or ("tool_calls" if calls else "stop"),
            steps=tuple(steps),
            logprobs=entries or None,
        )

    def _tokens(self, content: str | None) -> list[Token]:
        script = self.script
        if script.fault == "huge":
            return _slices(content or "")
        if isinstance(script.logprobs, tuple) and script.text is None and not script.texts:
            written = [str(entry.get("token", "")) for entry in script.logprobs]
            return [Token(each, each, each.encode()) for each in written]
        return tokenize(content or "")

    def _text(self, index: int) -> str | None:
        script = self.script
        text = script.text
        if script.texts:
            text = script.texts[index % len(script.texts)]
        elif text is None and isinstance(script.logprobs, tuple):
            text = "".join(str(entry.get("token", "")) for entry in script.logprobs)
        elif text is None and not (script.refusal or script.tool_calls):
            text = "All is well."
        if script.fault == "huge":
            sentence = text or "All is well. "
            return (sentence * (script.size_mb * 2**20 // len(sentence) + 1))[
                : script.size_mb * 2**20
            ]
        if script.fault == "invalid_utf8":
            return f"{NOT_UTF8}{text or ''}"
        return text

    def _entries(self, tokens: Sequence[Token], top: int) -> list[Object]:
        scripted = self.script.logprobs
        if isinstance(scripted, tuple):
            return [dict(entry) for entry in scripted]
        if scripted in ("null", "absent") or self.script.fault == "huge":
            return []
        top = min(max(top, 0), MAX_TOP_LOGPROBS)
        return logprob_entries(tokens, self.script.certainty, top, constant=scripted == "constant")

    def logprobs_field(self, value: object) -> Object:
        """`value` under the key `logprobs`, unless the script wants the key absent."""
        return {} if self.script.logprobs == "absent" else {"logprobs": value}

    def usage(self, spoken: Iterable[Said]) -> tuple[int, int, int]:
        """Tokens of the prompt, of the answer, and of its reasoning."""
        said = list(spoken)
        reasoning = sum(step.kind == "reasoning" for choice in said for step in choice.steps)
        return len(json.dumps(self.request)) // 4, sum(len(c.steps) for c in said), reasoning


def _slices(text: str) -> list[Token]:
    return [Token(text[at : at + _SLICE], "", b"") for at in range(0, len(text), _SLICE)]


def _steps(
    kind: str, tokens: Iterable[Token], supply: Iterator[Object], *, call: int = 0
) -> Iterator[Step]:
    for token in tokens:
        yield Step(kind, token.delta, list(itertools.islice(supply, 1)), call)
