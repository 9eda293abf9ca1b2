"""A window on a stream against the truth: what the same checks make of the whole text at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import orjson
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway import edits, sse, wire
from gateway.errors import ResponseBlocked
from gateway.window import Window
from policies import Policy, load_policy
from validators import MAX_FINDINGS, Finding, Scan

# ------------------------------------------------------------------------------------------------- the stream

#: A lane is a choice, and what of it: `content`, `refusal`, `reasoning`, `text`, or the arguments of the call of a number.
Lane = tuple[int, str | int]


def chunk(lane: Lane, text: str, **more: Any) -> dict[str, Any]:
    """A chunk in which one lane goes on by a text."""
    index, name = lane
    choice: dict[str, Any] = {"index": index, "finish_reason": None, **more}
    if name == "text":
        choice["text"] = text
    elif isinstance(name, int):
        choice["delta"] = {"tool_calls": [{"index": name, "function": {"arguments": text}}]}
    else:
        choice["delta"] = {name: text}
    return {"id": "c", "choices": [choice]}


def event(data: dict[str, Any]) -> sse.Event:
    return sse.event(sse.encode(orjson.dumps(data)))


def said(parts: Iterable[bytes]) -> dict[Lane, str]:
    """What a client has heard of each lane."""
    heard: dict[Lane, str] = {}
    for each in sse.Splitter().feed(b"".join(parts)):
        assert each.data is not None
        for choice in orjson.loads(each.data)["choices"]:
            delta = choice.get("delta", {})
            texts = [("text", choice.get("text"))]
            texts += [(name, delta.get(name)) for name in ("content", "refusal", "reasoning")]
            texts += [(c["index"], c["function"]["arguments"]) for c in delta.get("tool_calls", ())]
            for name, text in texts:
                if text:
                    lane = (choice["index"], name)
                    heard[lane] = heard.get(lane, "") + text
    return heard


class Hearing:
    """A window at work, and what its client has heard so far."""

    def __init__(self, policy: Policy) -> None:
        self.window = Window(policy)
        self.parts: list[bytes] = []

    def push(self, data: dict[str, Any]) -> None:
        sent = event(data)
        self.parts += self.window.push(sent.raw, sent)

    def finish(self) -> None:
        self.parts += self.window.finish()

    @property
    def said(self) -> dict[Lane, str]:
        return said(self.parts)


# -------------------------------------------------------------------------------------------------- the truth


def policy(*checks: dict[str, Any]) -> Policy:
    """A policy that windows can honour, with these checks."""
    document = {
        "policy": "window",
        "stream": "window",
        "risk": {"base": "low"},
        "stages": [{"name": "rules", "checks": list(checks)}] if checks else [],
        "confidence": {"source": "none", "when_uncalibrated": "return"},
    }
    return load_policy(orjson.dumps(document).decode(), file="window.yaml", read=lambda name: name)


def body(texts: dict[Lane, str]) -> bytes:
    """The whole answer that says these texts."""
    choices = []
    for index in sorted({index for index, _ in texts}):
        mine = {name: text for (i, name), text in texts.items() if i == index}
        calls = [
            {"type": "function", "function": {"name": "f", "arguments": text}}
            for name, text in mine.items()
            if isinstance(name, int)
        ]
        message = {name: text for name, text in mine.items() if isinstance(name, str)}
        choices.append({"index": index, "message": {**message, "tool_calls": calls}})
    return orjson.dumps({"choices": choices})


def found(rules: Policy, texts: dict[Lane, str]) -> list[tuple[Scan, Finding]]:
    """What the checks find in the whole answer."""
    from validators import Exchange

    exchange = Exchange("chat", {}, wire.read_response("chat", body(texts)).choices)
    return [
        (check, finding)
        for check in rules.checks
        if isinstance(check, Scan)
        for finding in check.run(exchange).findings
    ]


def redacted(rules: Policy, texts: dict[Lane, str]) -> dict[Lane, str]:
    """The texts as they are delivered of the whole answer."""
    reading = wire.read_response("chat", body(texts))
    new = edits.redacted_texts(reading, [finding for _, finding in found(rules, texts)])
    edited = orjson.loads(edits.with_texts(body(texts), new, reading))
    indices = sorted({index for index, _ in texts})
    result: dict[Lane, str] = {}
    for index, choice in zip(indices, edited["choices"], strict=True):
        names = [name for i, name in texts if i == index]
        calls = iter(choice["message"]["tool_calls"])
        for name in names:
            text = (
                next(calls)["function"]["arguments"]
                if isinstance(name, int)
                else choice["message"][name]
            )
            if text:
                result[index, name] = text
    return result


# ---------------------------------------------------------------------------------------------- random streams

_FRAGMENTS = [
    "CODE-1234", "CODE", "-", "1234", "12", "4242 4242 4242 4242", "4242424242424242", "ada@example.com",
    "@example.com", "+49 30 901820", "GB82 WEST 1234 5698 7654 32", "a", "aa", "b", "ab", " ", "\n", ".", "secret",
    "SECRET", "sec", "ret", "\u200b", "\u0301", "Ｃ", "ＯＤＥ－１２３４", "é", "\\u0043ODE-1234", "\\", "\\u00", "34",
    "\\ud83d\\ude00", "🦉", "한", "ᄒ", "ᅡ", "{", "}", "[", '"', '{"card": "4242424242424242"}', "x" * 40, "9" * 30,
]  # fmt: skip
texts = st.lists(st.sampled_from(_FRAGMENTS) | st.text(max_size=4), max_size=40).map("".join)
lanes = st.sampled_from(
    [(0, "content"), (1, "content"), (0, "reasoning"), (0, "refusal"), (0, 0), (0, 1)]
)

_PATTERNS = [
    "\\bCODE-\\d{4}\\b",
    "a{2,4}",
    "aa",
    "\\d{4}",
    "(?i)secret",
    "ab?",
    "é",
    "^a",
    "b$",
    "\\Ba",
]
scans = st.lists(
    st.sets(st.sampled_from(_PATTERNS), min_size=1, max_size=3).map(
        lambda chosen: {"use": "redact", "patterns": sorted(chosen), "replacement": "<hidden>"}
    )
    | st.sets(st.sampled_from(_PATTERNS), min_size=1, max_size=3).map(
        lambda chosen: {"use": "redact", "patterns": sorted(chosen), "replacement": ""}
    )
    | st.sets(st.sampled_from(["card", "us_ssn", "iban", "email", "phone"]), min_size=1).map(
        lambda kinds: {"use": "pii", "kinds": sorted(kinds)}
    ),
    min_size=1,
    max_size=3,
).map(lambda chosen: [{"id": f"check_{n}", **each} for n, each in enumerate(chosen)])

_TARGETS = ["text", "tool_arguments", "refusal", "reasoning"]


def acting(checks: Sequence[dict[str, Any]], on_fail: str) -> Policy:
    return policy(*({**check, "on_fail": on_fail, "target": _TARGETS} for check in checks))


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[Lane, str]]:
    """Deltas of several lanes, their order mixed."""
    whole = draw(st.dictionaries(lanes, texts, min_size=1, max_size=3))
    queues = {}
    for lane, text in whole.items():
        cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=60)))
        edges = [0, *cuts, len(text)]
        queues[lane] = [text[a:b] for a, b in itertools.pairwise(edges) if a < b]
    order = [lane for lane, queue in queues.items() for _ in queue]
    mixed = draw(st.permutations(order))
    return [(lane, queues[lane].pop(0)) for lane in mixed]


def joined(deltas: Iterable[tuple[Lane, str]]) -> dict[Lane, str]:
    whole: dict[Lane, str] = {}
    for lane, text in deltas:
        whole[lane] = whole.get(lane, "") + text
    return whole


# ------------------------------------------------------------------------------------------------- properties


@settings(max_examples=400, deadline=None)
@given(streams(), scans)
def test_a_redacted_stream_says_what_the_redacted_whole_says(
    deltas: list[tuple[Lane, str]], checks: list[dict[str, Any]]
) -> None:
    rules = acting(checks, "redact")
    whole = joined(deltas)
    counts = [check.id for check, _ in found(rules, whole)]
    hearing = Hearing(rules)
    too_many = any(counts.count(check["id"]) >= MAX_FINDINGS for check in checks)
    try:
        for lane, text in deltas:
            hearing.push(chunk(lane, text))
        hearing.finish()
    except ResponseBlocked:
        assert too_many
        return
    assert not too_many
    assert hearing.said == redacted(rules, whole)
