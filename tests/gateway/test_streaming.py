"""A window on a stream against the truth: what the same checks make of the whole text at once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gateway import edits, sse, wire
from gateway.errors import ResponseBlocked
from gateway.window import Window
from policies import Policy, load_policy
from tests.policies.build import policy as made
from tests.policies.build import stage
from validators import MAX_FINDINGS, CheckResult, Exchange, Finding, Redact, Scan
from validators.normalise import Growing
from validators.scan import Sighting

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
            texts: list[tuple[str | int, Any]] = [("text", choice.get("text"))]
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

    def all(self, texts: Iterable[str]) -> None:
        """The whole of an answer, in these pieces."""
        for text in texts:
            self.push(chunk((0, "content"), text))
        self.finish()

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
    "\\\\u0043ODE-1234", "\\\\", "\\\\u00", "\\\\u0301", "\u0421\u041eDE-1234", "s\u0435cr", "CODE\u2013", "\u0430\u0430", "10.8.8.8", "8.8.", "2001:4860:4860::8888", "fe80::1", ":", "212 555 2368", "SECRET", "sec", "ret", "\u200b", "\u0301", "Ｃ", "ＯＤＥ－１２３４", "é", "\\u0043ODE-1234", "\\", "\\u00", "34",
    "\\ud83d\\ude00", "🦉", "한", "ᄒ", "ᅡ", "{", "}", "[", '"', '{"card": "4242424242424242"}', "x" * 40, "9" * 30,
]  # fmt: skip
mixed = st.lists(st.sampled_from(_FRAGMENTS) | st.text(max_size=4), max_size=40).map("".join)
_ALPHABETS = [
    "ab",
    "a1",
    "1 ",
    "a\\",
    "ae\u0301\u200b",
    "12.-",
    "\u1112\u1161\u11aba1",
    "a\u0430\u0301\u0456\u0308",
]
#: Texts in which matches overlap, touch and hide each other for long stretches.
dense = st.sampled_from(_ALPHABETS).flatmap(lambda alphabet: st.text(alphabet, max_size=250))
texts = mixed | dense
lanes: st.SearchStrategy[Lane] = st.sampled_from(
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
    "a.a",
    "a?b?1",
    "\\d{2,5}",
]
scans = st.lists(
    st.sets(st.sampled_from(_PATTERNS), min_size=1, max_size=3).map(
        lambda chosen: {"use": "redact", "patterns": sorted(chosen), "replacement": "<hidden>"}
    )
    | st.sets(st.sampled_from(_PATTERNS), min_size=1, max_size=3).map(
        lambda chosen: {"use": "redact", "patterns": sorted(chosen), "replacement": ""}
    )
    | st.sets(st.sampled_from(["card", "us_ssn", "iban", "email", "phone", "ip"]), min_size=1).map(
        lambda kinds: {"use": "pii", "kinds": sorted(kinds)}
    )
    | st.just({"use": "pii", "kinds": ["phone"], "region": "US"}),
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
    shuffled = draw(st.permutations(order))
    return [(lane, queues[lane].pop(0)) for lane in shuffled]


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


def first_matches(rules: Policy, whole: dict[Lane, str]) -> dict[Lane, int]:
    """Where in each lane that matches anywhere the first match begins; what is masked of JSON may begin before."""
    begins: dict[Lane, int] = {}
    for lane, text in whole.items():
        if found(rules, {lane: text}):
            seen = Growing(text, ended=True, may_be_json=True)
            sightings = [c.follow(seen, "") for c in rules.checks if isinstance(c, Scan)]
            begins[lane] = min(f.span[0] for s in sightings for f in s.findings if f.span)
    return begins


@settings(max_examples=300, deadline=None)
@given(streams(), scans)
def test_no_character_of_a_match_that_blocks_goes_out(
    deltas: list[tuple[Lane, str]], checks: list[dict[str, Any]]
) -> None:
    rules = acting(checks, "block")
    whole = joined(deltas)
    begins = first_matches(rules, whole)
    hearing = Hearing(rules)
    blocked = False
    try:
        for lane, text in deltas:
            hearing.push(chunk(lane, text))
        hearing.finish()
    except ResponseBlocked:
        blocked = True
    assert blocked == bool(begins)
    for lane, text in hearing.said.items():
        assert whole[lane].startswith(text)
        assert len(text) <= begins.get(lane, len(whole[lane]))
    if not blocked:
        assert hearing.said == whole


@settings(max_examples=150, deadline=None)
@given(streams())
def test_a_stream_without_matches_goes_out_byte_for_byte(deltas: list[tuple[Lane, str]]) -> None:
    rules = acting([{"id": "never", "use": "forbid", "patterns": ["NEVER{3}SAID"]}], "block")
    hearing = Hearing(rules)
    sent: list[bytes] = []
    for lane, text in deltas:
        data = b'{"id" : "c","choices":[' + orjson.dumps(chunk(lane, text)["choices"][0]) + b" ]}"
        raw = b": odd\ndata:" + data + b"\r\n\r\n"
        sent.append(raw)
        hearing.parts += hearing.window.push(raw, sse.event(raw))
    hearing.finish()
    assert sorted(hearing.parts) == sorted(sent)
    if len({lane for lane, _ in deltas}) == 1:
        assert hearing.parts == sent


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("abcdef 123.é\n", min_size=1, max_size=9), min_size=1, max_size=80))
def test_text_in_which_no_match_can_begin_goes_out_at_once(pieces: list[str]) -> None:
    patterns = ["CODE-\\d{4}", "x?yz", "(?i)\\bkey[a-z]{0,500}"]
    hearing = Hearing(acting([{"id": "one", "use": "forbid", "patterns": patterns}], "block"))
    for pushed, piece in enumerate(pieces, start=1):
        hearing.push(chunk((0, "content"), piece))
        assert hearing.said == {(0, "content"): "".join(pieces[:pushed])}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.text("CODE-1a ", min_size=1, max_size=2), min_size=1, max_size=80))
def test_no_more_is_held_back_than_may_become_a_match(pieces: list[str]) -> None:
    begun = re.compile(r"\b(?:C|CO|COD|CODE(?:-\d{0,4})?)\Z")
    hearing = Hearing(acting(CODES, "block"))
    pushed, ends = "", [0]
    for piece in pieces:
        pushed += piece
        ends.append(len(pushed))
        if re.search(r"\bCODE-\d{4}\b", pushed):
            return
        hearing.push(chunk((0, "content"), piece))
        # A mark may yet make another letter of the last one.
        sure = pushed[:-1] if pushed[-1].isalpha() else pushed
        open_ones = [match.start() for text in (pushed, sure) if (match := begun.search(text))]
        due = max(end for end in ends if end <= min(open_ones, default=len(pushed)))
        assert len(hearing.said.get((0, "content"), "")) >= due


# --------------------------------------------------------------------------------------------------- examples

CARDS = [{"id": "cards", "use": "pii", "kinds": ["card"]}]
CODES = [{"id": "codes", "use": "forbid", "patterns": ["\\bCODE-\\d{4}\\b"]}]


def heard(rules: Policy, *chunks: dict[str, Any]) -> bytes:
    hearing = Hearing(rules)
    for each in chunks:
        hearing.push(each)
    hearing.finish()
    return b"".join(hearing.parts)


def test_a_number_in_tool_arguments_is_replaced_by_text_in_quotes() -> None:
    pieces = ['{"card": 4242', "4242424242", '42, "note": "4242 4242 4242 4242"}']
    out = said([heard(acting(CARDS, "redact"), *(chunk((0, 3), piece) for piece in pieces))])
    redacted = {"card": "[redacted:card]", "note": "[redacted:card]"}
    assert orjson.loads(out[0, 3]) == redacted


def test_digits_of_an_escape_are_no_part_of_a_number() -> None:
    text = '{"note": "\\u4242424242424242 and \\u0034242424242424242"}'
    out = said([heard(acting(CARDS, "redact"), *(chunk((0, 0), piece) for piece in text))])
    [(_, finding)] = found(acting(CARDS, "redact"), {(0, 0): text})
    assert out == redacted(acting(CARDS, "redact"), {(0, 0): text})
    assert finding.span is not None
    assert orjson.loads(out[0, 0]) == {"note": "\u4242424242424242 and [redacted:card]"}


@pytest.mark.parametrize("name", ["content", 0], ids=["text", "arguments"])
def test_json_goes_out_at_its_end(name: str | int) -> None:
    hearing = Hearing(acting(CARDS, "redact"))
    hearing.push(chunk((0, name), ' {"a": 1, '))
    hearing.push(chunk((0, name), '"b": 2}' + " " * 500))
    assert hearing.said == {}
    hearing.finish()
    assert hearing.said[0, name].strip() == '{"a": 1, "b": 2}'


def test_json_that_is_not_to_be_masked_goes_out_as_it_comes() -> None:
    hearing = Hearing(acting(CODES, "block"))
    for text in ('{"a": "b', '\\n", ', '"c": 1'):
        hearing.push(chunk((0, "content"), text))
    assert hearing.said == {(0, "content"): '{"a": "b\\n", "c": 1'}


@pytest.mark.parametrize("end", ['"}', ""], ids=["json", "text"])
def test_only_the_end_tells_whether_an_escape_is_part_of_a_match(end: str) -> None:
    """In JSON `\\n1234` is a line feed and a number, in other text an n stands before the digits."""
    rules = acting([{"id": "n", "use": "forbid", "patterns": ["n\\d{4}"]}], "block")
    hearing = Hearing(rules)
    for text in ('{"a": "', "b\\n12", "34 c", "d"):
        hearing.push(chunk((0, "content"), text))
    assert hearing.said == {(0, "content"): '{"a": "'}
    hearing.push(chunk((0, "content"), end or "."))
    if end:
        hearing.finish()
        assert hearing.said == {(0, "content"): '{"a": "b\\n1234 cd"}'}
    else:
        with pytest.raises(ResponseBlocked, match="pattern_1"):
            hearing.finish()


def test_what_is_held_back_of_one_text_holds_back_no_other() -> None:
    hearing = Hearing(acting(CODES, "block"))
    hearing.push(chunk((0, "reasoning"), "Hm, CODE"))
    hearing.push(chunk((0, 0), "{}"))
    hearing.push(chunk((0, "content"), "This is the answer."))
    assert hearing.said == {(0, "content"): "This is the answer."}
    hearing.finish()
    assert hearing.said[0, "reasoning"] == "Hm, CODE"


def test_the_end_of_a_choice_does_not_overtake_its_text() -> None:
    hearing = Hearing(acting(CODES, "block"))
    hearing.push({"id": "c", "choices": [{"index": 0, "delta": {"role": "assistant"}}]})
    hearing.push(chunk((0, "content"), "Yes, CODE"))
    hearing.push({"id": "c", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    hearing.push({"id": "c", "choices": [], "usage": {"total_tokens": 3}})
    assert len(hearing.parts) == 1
    hearing.finish()
    ends = [
        b"assistant" in p or b"Yes" in p or b"stop" in p or b"usage" in p for p in hearing.parts
    ]
    assert ends == [True] * 4
    assert [b"Yes" in part for part in hearing.parts] == [False, True, False, False]
    assert b"usage" in hearing.parts[3]


def test_a_text_no_check_looks_at_goes_out_at_once() -> None:
    text_only = policy({**CODES[0], "on_fail": "block", "target": ["text"]})
    hearing = Hearing(text_only)
    for lane in ((0, "reasoning"), (0, "refusal"), (0, 2)):
        hearing.push(chunk(lane, "CODE-1234"))
    assert set(hearing.said) == {(0, "reasoning"), (0, "refusal"), (0, 2)}


@pytest.mark.parametrize("checks", [[], [{"id": "size", "use": "length", "max_chars": 1}]])
def test_a_policy_that_neither_blocks_nor_redacts_lets_everything_through(
    checks: list[dict[str, Any]],
) -> None:
    hearing = Hearing(policy(*({**check, "on_fail": "flag"} for check in checks)))
    hearing.push(chunk((0, "content"), "Yes."))
    assert hearing.said == {(0, "content"): "Yes."}


@pytest.mark.parametrize(
    "choice",
    [
        {"index": 0, "text": "CODE-1234"},
        {"index": 0, "delta": {"content": [{"type": "text", "text": "CODE-1234"}]}},
        {"index": 0, "delta": {"content": [{"type": "refusal", "refusal": "CODE-1234"}]}},
        {"index": 0, "delta": {"function_call": {"arguments": "CODE-1234"}}},
        {"index": 0, "delta": {"tool_calls": [{"custom": {"input": "CODE-1234"}}]}},
        {"index": 0, "delta": {"tool_calls": [{"function": {"arguments": "CODE-1234"}}]}},
        {"index": 0, "delta": {"reasoning_content": "CODE-1234"}},
        {"index": 0, "message": {"content": "CODE-1234"}},
        {"index": None, "delta": {"content": "CODE-1234"}},
        {"delta": {"refusal": "CODE-1234"}},
        {"delta": {"content": [{"type": "x", "transcript": "CODE-1234"}]}},
    ],
    ids=lambda choice: "-".join(choice),
)
def test_every_place_for_text_is_looked_at(choice: dict[str, Any]) -> None:
    with pytest.raises(ResponseBlocked, match="codes"):
        heard(acting(CODES, "block"), {"choices": [choice]})


def test_speech_is_not_let_through() -> None:
    with pytest.raises(ResponseBlocked, match="speech"):
        heard(acting(CODES, "block"), {"choices": [{"delta": {"audio": {"data": "UklGRg=="}}}]})


def test_calls_without_a_number_are_texts_of_their_own() -> None:
    calls = [{"function": {"name": "f", "arguments": part}} for part in ("CODE-", "1234")]
    out = heard(acting(CODES, "block"), {"choices": [{"index": 0, "delta": {"tool_calls": calls}}]})
    assert b"1234" in out


def test_logprobs_of_what_is_masked_go_with_it() -> None:
    spelt = {"content": [{"token": "4242", "logprob": -0.1}]}
    chunks = [chunk((0, "content"), "4242", logprobs=spelt) for _ in range(4)]
    out = heard(
        acting(CARDS, "redact"), *chunks, chunk((0, "content"), " It is fine.", logprobs=spelt)
    )
    events = [orjson.loads(e.data or b"") for e in sse.Splitter().feed(out)]
    assert [e["choices"][0]["logprobs"] for e in events] == [None] * 4 + [spelt]
    assert said([out]) == {(0, "content"): "[redacted:card] It is fine."}


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_more_matches_than_can_be_told_end_the_stream(cut: int) -> None:
    """The whole answer would be held, which a stream that has begun cannot be."""
    rules = acting([{"id": "fours", "use": "redact", "patterns": ["\\b\\d{4}\\b"]}], "redact")
    few, many = ("1234 " * count for count in (MAX_FINDINGS - 1, MAX_FINDINGS))
    out = said(
        [heard(rules, *(chunk((0, "content"), few[i : i + cut]) for i in range(0, len(few), cut)))]
    )
    assert out[0, "content"] == "[redacted:pattern_1] " * (MAX_FINDINGS - 1)
    hearing = Hearing(rules)
    with pytest.raises(ResponseBlocked, match="more"):
        hearing.all(many[i : i + cut] for i in range(0, len(many), cut))
    assert "1234" not in "".join(hearing.said.values())


def test_matches_are_counted_over_all_choices() -> None:
    rules = acting([{"id": "fours", "use": "redact", "patterns": ["\\b\\d{4}\\b"]}], "redact")
    half = "1234 " * (MAX_FINDINGS // 2)
    with pytest.raises(ResponseBlocked, match="more to mask"):
        heard(rules, chunk((0, "content"), half), chunk((1, "content"), half))


class Broken(Redact):
    """A check that fails to run."""

    def run(self, exchange: Exchange) -> CheckResult:
        raise KeyError(exchange.choices[0].text)

    def follow(self, text: Growing, path: str) -> Sighting:
        raise KeyError(text.text, path)


@pytest.mark.parametrize("lane", [(0, "content"), (0, 0)], ids=["text", "arguments"])
def test_a_check_that_cannot_run_ends_the_stream(lane: Lane) -> None:
    broken = Broken.model_validate({"id": "broken", "use": "redact", "patterns": ["x{1,3}"]})
    with pytest.raises(ResponseBlocked, match="could not run") as caught:
        heard(made(stage(broken)), chunk(lane, "Yes."))
    assert "Yes" not in caught.value.message


def test_a_text_that_hides_nearly_all_of_itself_ends_the_stream() -> None:
    hearing = Hearing(acting(CODES, "block"))
    with pytest.raises(ResponseBlocked, match="its own text"):
        hearing.all(["CODE", *itertools.repeat("\u200b" * 1000, 400)])
    assert hearing.said == {}


def test_a_match_with_much_hidden_inside_it_is_found() -> None:
    text = "CODE" + "\u200b" * 30_000 + "-1234 and so on, and so on."
    with pytest.raises(ResponseBlocked, match="codes"):
        heard(
            acting(CODES, "block"),
            *(chunk((0, "content"), text[i : i + 999]) for i in range(0, len(text), 999)),
        )


class Counting(Redact):
    """A check that counts the characters it is given to look at."""

    looked_at: ClassVar[int] = 0

    def run(self, exchange: Exchange) -> CheckResult:
        Counting.looked_at += sum(len(p.text) for p in exchange.passages(self.target))
        return super().run(exchange)

    def follow(self, text: Growing, path: str) -> Sighting:
        Counting.looked_at += len(text.text)
        return super().follow(text, path)


@pytest.mark.parametrize("lane", [(0, "content"), (0, 0)], ids=["text", "arguments"])
@pytest.mark.parametrize("piece", ["Nothing to see here, ", "CO", '{"a": "'])
def test_no_character_of_a_long_stream_is_looked_at_often(lane: Lane, piece: str) -> None:
    config = {"id": "counting", "use": "redact", "target": _TARGETS, "patterns": ["CODE-\\d{4}"]}
    window = Window(made(stage(Counting.model_validate(config))))
    sent = event(chunk(lane, piece))
    Counting.looked_at = 0
    for _ in range(2_000):
        window.push(sent.raw, sent)
    window.finish()
    assert Counting.looked_at <= 3 * 2_000 * len(piece)


@example("CODE-1234")
@given(st.text(max_size=30))
def test_how_a_text_is_cut_makes_no_difference(text: str) -> None:
    rules = acting([{**CODES[0], "use": "redact"}], "redact")
    whole = said([heard(rules, chunk((0, "content"), text))])
    pieces = said([heard(rules, *(chunk((0, "content"), char) for char in text))])
    assert whole == pieces
