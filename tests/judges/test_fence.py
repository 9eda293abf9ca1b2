"""What stands between the fences can neither end them nor look like one."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from judges.fence import as_data, fenced

NONCE = "0123456789abcdef"

texts = st.text() | st.lists(
    st.sampled_from(
        [
            NONCE,
            NONCE.upper(),
            NONCE[:-1],
            "f",
            "\\",
            "\\u00",
            "é",
            "<<<",
            ">>>",
            "\n",
            '"',
            "\ud800",
        ]
    ),
    max_size=12,
).map("".join)


@given(texts)
def test_the_document_comes_back_and_shows_neither_nonce_nor_fence(text: str) -> None:
    data = as_data({"answer": text}, NONCE)
    assert json.loads(data) == {"answer": text}
    assert data.isascii()
    assert len(data.splitlines()) == 1
    assert NONCE not in data.lower()
    assert not set("<>") & set(data)


@given(texts)
def test_a_fence_is_three_lines(text: str) -> None:
    first, data, last = fenced({"answer": text}, NONCE).splitlines()
    assert (first, last) == (f"<<<{NONCE}", f"{NONCE}>>>")
    assert json.loads(data) == {"answer": text}


@pytest.mark.parametrize("digit", "0f")
def test_a_nonce_that_repeats_itself_is_broken_everywhere(digit: str) -> None:
    nonce = digit * 16
    text = digit * 100
    data = as_data({"answer": text}, nonce)
    assert nonce not in data
    assert json.loads(data) == {"answer": text}


@pytest.mark.parametrize("nonce", ["", "abc", "0123456789ABCDEF", "0123456789abcdeg", "a" * 65])
def test_a_nonce_is_hexadecimal_and_long(nonce: str) -> None:
    with pytest.raises(ValueError, match="16 to 64"):
        fenced({}, nonce)
