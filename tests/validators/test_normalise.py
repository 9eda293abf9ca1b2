"""Normalised views and the way back to the text as written."""

from __future__ import annotations

import json
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from validators.normalise import _LOOKS, View, views


def folded(text: str, *, is_json: bool = False) -> View:
    return views(text, is_json=is_json)[-1]


def test_plain_ascii_has_one_view() -> None:
    assert [view.text for view in views("plain", is_json=False)] == ["plain"]


def test_text_that_folding_leaves_alone_has_one_view() -> None:
    assert len(views("naïve café, 日本語", is_json=False)) == 1


def test_hidden_characters_are_dropped_and_spans_lead_back_over_them() -> None:
    view = folded("a\u200bb\u2060c")

    assert view.text == "abc"
    assert view.original(0, 3) == (0, 5)
    assert view.original(2, 3) == (4, 5)


def test_one_character_that_becomes_many_is_covered_whole() -> None:
    view = folded("x\ufdfay")

    start = view.text.index("ص")
    assert view.original(start + 3, start + 4) == (1, 2)
    assert view.original(0, 1) == (0, 1)
    assert view.original(len(view.text) - 1, len(view.text)) == (2, 3)


def test_escapes_of_json_are_undone_in_the_first_view() -> None:
    written, *_ = views(r'{"a":"\u0041\n\/"}', is_json=True)

    assert written.text == '{"a":"A\n/"}'
    assert written.original(6, 7) == (6, 12)


def test_escapes_of_other_text_are_undone_in_the_second_view_only() -> None:
    written, undone = views(r"C:\new \u0041", is_json=False)

    assert written.text == r"C:\new \u0041"
    assert undone.text == "C:\new A"


def test_escapes_of_json_in_a_string_of_json_are_undone_too() -> None:
    inner = json.dumps({"code": "\u00e9CODE"})
    *_, once, twice = views(json.dumps({"text": inner}), is_json=True)

    assert once.text == f'{{"text": "{inner}"}}'
    assert twice.text == '{"text": "{"code": "\u00e9CODE"}"}'
    start = twice.text.index("\u00e9")
    assert twice.original(start, start + 1) == (start + 3, start + 10)


def test_letters_that_look_like_ascii_are_read_as_ascii_in_a_view_of_their_own() -> None:
    written, *_, read = views(
        "p\u0430\u200bss\u03bfr\u0501 \uff21\u039a\u0406\u0410\u20131", is_json=False
    )

    assert read.text == "passord AKIA-1"
    assert read.original(0, 3) == (0, 4)
    assert read.original(3, 4) == (4, 5)
    assert written.text.startswith("p\u0430\u200bss")


def test_what_is_read_as_ascii_is_one_character_that_no_mark_makes() -> None:
    """Else the beginning of a stream could say what its end takes back."""
    for code, ascii_code in _LOOKS.items():
        char = chr(code)
        assert chr(ascii_code).isascii()
        assert unicodedata.normalize("NFKC", char) == char == unicodedata.normalize("NFD", char)


def test_surrogate_pair_is_one_character() -> None:
    view = folded(r"\ud83d\ude00!")

    assert view.text == "😀!"
    assert view.original(0, 1) == (0, 12)


def test_half_a_surrogate_pair_keeps_offsets() -> None:
    for text in ("a\ud800b", r"a\ud800b", r"a\u0041\udc00b"):
        view = views(text, is_json=False)[-1]
        assert len(view.data.decode()) == len(view.text)
        start = view.text.index("b")
        assert view.original(start, start + 1) == (len(text) - 1, len(text))


@given(st.text(max_size=60))
def test_every_view_leads_back_to_spans_in_order_inside_the_text(text: str) -> None:
    for view in views(text, is_json=False):
        last = 0
        for index in range(len(view.text)):
            start, end = view.original(index, index + 1)
            assert last <= start < end <= len(text)
            last = start


@given(
    st.text(
        alphabet=st.characters(codec="utf-8", exclude_categories=["Cs"], exclude_characters="\\"),
        max_size=40,
    )
)
def test_folded_text_is_the_text_in_nfkc(text: str) -> None:
    visible = "".join(
        char for char in text if folded(char).text or not unicodedata.normalize("NFKC", char)
    )
    if visible == text:
        assert folded(text).text.translate(_LOOKS) == unicodedata.normalize("NFKC", text).translate(
            _LOOKS
        )


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_view_of_a_json_string_holds_its_value(value: str) -> None:
    document = json.dumps([value])

    assert views(document, is_json=True)[0].text == f'["{value}"]'
