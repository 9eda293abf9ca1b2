"""Which tokens wrote the answer: located by text, by bytes where characters are split, or not at all."""

from __future__ import annotations

import time
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from policies.answer import answer_tokens, final, named_values, written
from tests.validators.test_location import JSON_VALUES
from validators import Choice, Passage, TokenLogprob, ToolCall
from validators.location import scalars

TEXTS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40)


def split(text: str, cuts: list[int]) -> list[str]:
    places = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in pairwise(places)]


def token(text: str, data: bytes | None = None) -> TokenLogprob:
    raw = b"null" if data is None else str(list(data)).encode()
    return TokenLogprob(-1.0, text, utf8=msgspec.Raw(raw))


def spelt(*texts: str) -> list[TokenLogprob]:
    return [token(text) for text in texts]


def choice_of(*texts: str, content: str | None = None) -> Choice:
    text = "".join(texts) if content is None else content
    return Choice("choices[0]", (Passage("p", text),), logprobs=spelt(*texts))


def answer_of(choice: Choice) -> list[str]:
    assert choice.logprobs is not None
    return [choice.logprobs[each].token for each in answer_tokens(choice)]


# ------------------------------------------------------------------------------------------------------ locating


@given(text=TEXTS, cuts=st.lists(st.integers(0, 40), max_size=8), data=st.data())
def test_tokens_of_a_span_wrote_it_and_no_fewer_did(
    text: str, cuts: list[int], data: st.DataObject
) -> None:
    pieces = split(text, cuts)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    if not text.strip():
        assert written(spelt(*pieces), [Passage("p", text)]) == []
        return
    ((_, by),) = written(spelt(*pieces), [Passage("p", text)])
    ((first, last),) = by.tokens([(start, end)])
    before, inside = "".join(pieces[:first]), "".join(pieces[first:last])
    assert len(before) <= start < len(before) + len(pieces[first])
    assert len(before) + len(inside) - len(pieces[last - 1]) < end <= len(before) + len(inside)


@given(
    text=st.text(alphabet="ab{}é😀語", min_size=1, max_size=12),
    cuts=st.lists(st.integers(0, 40), max_size=20),
    data=st.data(),
)
def test_split_characters_are_found_by_their_bytes(
    text: str, cuts: list[int], data: st.DataObject
) -> None:
    raw = text.encode()
    places = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    pieces = [raw[a:b] for a, b in pairwise(places)]
    tokens = [token(piece.decode("utf-8", "replace"), piece) for piece in pieces]
    ((_, by),) = written(tokens, [Passage("p", text)])
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    ((first, last),) = by.tokens([(start, end)])
    size = len(text[:start].encode())
    width = len(text[start:end].encode())
    before = sum(map(len, pieces[:first]))
    upto = sum(map(len, pieces[:last]))
    assert before <= size < before + len(pieces[first])
    assert upto - len(pieces[last - 1]) < size + width <= upto


def test_split_characters_in_escapes_are_found_by_their_bytes() -> None:
    smile = "😀".encode()
    tokens = [
        token('{"a": "', b'{"a": "'),
        token("\\xf0\\x9f", smile[:2]),
        token("\\x98\\x80", smile[2:]),
        token('"}'),
    ]
    choice = Choice("c", (Passage("p", '{"a": "😀"}'),), logprobs=tokens)
    assert answer_tokens(choice) == [1, 2]


@pytest.mark.parametrize("raw", [b'"abc"', b"[300]", b"[-1]", b"[1.5]", b"{}"])
def test_bytes_that_are_none_locate_nothing_and_raise_nothing(raw: bytes) -> None:
    tokens = [TokenLogprob(-1.0, "\ufffd", utf8=msgspec.Raw(raw))]
    assert written(tokens, [Passage("p", "é")]) == []


def test_replacement_characters_without_bytes_locate_nothing() -> None:
    assert answer_tokens(choice_of("caf", "\ufffd", "\ufffd", content="café")) == []


@pytest.mark.parametrize(
    "tokens",
    [
        ("<|start|>", "4", "2", "<|im_end|>"),
        ("<think>", "4", "2", "? No. Yes.", "</think>", "4", "2"),
        ("4", "2", "", "\n"),
        ("", "4", "", "2"),
    ],
    ids=["special tokens", "reasoning before", "cut at a stop", "empty tokens"],
)
def test_what_tokens_say_around_the_text_does_no_harm(tokens: tuple[str, ...]) -> None:
    choice = choice_of(*tokens, content="42")
    assert "".join(answer_of(choice)) == "42"
    assert answer_tokens(choice)[0] >= len(tokens) - 4


def test_equal_texts_are_found_in_their_order() -> None:
    calls = tuple(ToolCall("pay", Passage(f"calls[{n}]", '{"a":1}')) for n in range(2))
    choice = Choice("c", tool_calls=calls, logprobs=spelt(*['{"a":', "1", "}"] * 2))
    assert dict(named_values(choice)) == {"calls[0]#/a": (1, 2), "calls[1]#/a": (4, 5)}


def test_looking_for_text_that_is_not_there_takes_no_longer_than_reading_it() -> None:
    letters = 400_000
    began_s = time.perf_counter()
    tokens = spelt(*["a"] * letters)
    assert written(tokens, [Passage("p", "b" + "a" * (letters // 2))]) == []
    assert time.perf_counter() - began_s < 10


# ------------------------------------------------------------------------------------------------- what the answer is


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"),
        ("(C)", "C"),
        ("B) Paris is the capital", "B"),
        ("Let me think: A or B?\nThe answer is (B).", "B"),
        ("**Answer: D**", "D"),
        ("The correct option is A", "A"),
        ("The answer is Paris.", "Paris"),
        ("Final answer: 1,200.50 EUR", "1,200.50"),
        ("3 + 4 makes 7 apples.", "7"),
        ("#### -12", "-12"),
        ("The result is $3", "3"),
        ("\\boxed{42}", "42"),
        ("Step 1: think.\n\nIt is in Paris.\n\n", "It is in Paris."),
        ("I think so.", "I think so."),
        ("The answer is: ", "The answer is:"),
    ],
)
def test_final_answer(text: str, answer: str) -> None:
    start, end = final(text)
    assert text[start:end] == answer


@given(st.text(min_size=1, max_size=700).filter(str.strip))
def test_every_text_that_says_something_has_a_final_answer(text: str) -> None:
    start, end = final(text)
    assert 0 <= start < end <= len(text)
    assert text[start:end].strip()


@pytest.mark.parametrize(
    ("tokens", "answer"),
    [
        (('{"', "a", '":', "1", ',"', "b", '":"', "x", " y", '"}'), ["1", "x", " y"]),
        (("[", "1", ",", "2", "]"), ["1", "2"]),
        (("```json\n", '{"a":', "1", "}\n```"), ["1"]),
        (('{"a":1,"b":2}',), ['{"a":1,"b":2}']),
        (('{"a":', '""', "}"), ['""']),
        (("{", "}"), ["{", "}"]),
        (("The", " answer", " is", " 4", "2", "."), [" 4", "2"]),
    ],
    ids=["object", "array", "fence", "one token", "empty string", "no values", "number"],
)
def test_answer_is_what_its_tokens_say(tokens: tuple[str, ...], answer: list[str]) -> None:
    assert answer_of(choice_of(*tokens)) == answer


def test_of_a_choice_with_tool_calls_the_answer_is_what_they_pass() -> None:
    call = ToolCall("pay", Passage("arguments", '{"amount":5}'))
    said = ("Paying", " 7", '{"amount":', "5", "}")
    text = (Passage("content", "Paying 7"),)
    choice = Choice("c", text, tool_calls=(call,), logprobs=spelt(*said))
    assert answer_of(choice) == ["5"]
    without = Choice("c", text, tool_calls=(call,), logprobs=spelt("Paying", " 7"))
    assert answer_of(without) == []


@given(value=JSON_VALUES, cuts=st.lists(st.integers(0, 200), max_size=20))
def test_values_of_json_are_written_by_the_tokens_named(value: object, cuts: list[int]) -> None:
    text = msgspec.json.encode([value]).decode()
    choice = choice_of(*split(text, cuts))
    found = list(named_values(choice))
    assert [path for path, _ in found] == [f"p#{where}" for where, _ in scalars(text)]
    assert choice.logprobs is not None
    for (_, (first, last)), (_, (start, end)) in zip(found, scalars(text), strict=True):
        own = "".join(each.token for each in choice.logprobs[first:last])
        assert text[start:end] in own
