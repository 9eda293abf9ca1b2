"""Places in the text of JSON, checked against slicing the text at them."""

from __future__ import annotations

import json
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from validators.location import (
    MAX_TEXT_CHARS,
    places,
    pointer,
    scalar_spans,
    scalars,
    value_spans,
)

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


def paths_of(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    steps = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(found for step, child in steps for found in paths_of(child, (*path, step)))]


def at(value: Any, path: tuple[str | int, ...]) -> Any:
    for step in path:
        value = value[step]
    return value


@given(value=JSON_VALUES, indent=st.sampled_from([None, 2]), escape=st.booleans())
def test_text_at_the_span_of_a_path_is_its_value(
    value: Any, indent: int | None, escape: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=escape)
    paths = paths_of(value)

    spans = value_spans(text, paths)

    assert set(spans) == set(paths)
    for path, span in spans.items():
        assert json.loads(text[slice(*span)]) == at(value, path)


@given(value=JSON_VALUES, data=st.data())
def test_place_is_the_smallest_value_around_a_span(value: Any, data: st.DataObject) -> None:
    text = json.dumps(value)
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))

    (place,) = places(text, [(start, end)])

    assert place is not None
    assert place.start <= start
    assert end <= place.end
    json.loads(text[place.start : place.end])
    inner = [
        span
        for span in value_spans(text, paths_of(value)).values()
        if place.start <= span[0] <= start and end <= span[1] <= place.end
    ]
    assert all(span == (place.start, place.end) for span in inner)


def test_last_of_repeated_keys_counts_as_parsers_have_it() -> None:
    assert value_spans('{"a":1,"a":22}', [("a",)]) == {("a",): (11, 13)}


def test_key_is_a_place_of_its_own() -> None:
    (place,) = places('{"mail@x.org":1}', [(2, 12)])

    assert place is not None
    assert (place.pointer, place.start, place.end, place.in_string) == ("/mail@x.org", 1, 13, True)


def test_pointer_is_escaped_and_bounded() -> None:
    assert pointer(["a/b", "c~d", 0]) == "/a~1b/c~0d/0"
    assert len(pointer(["x" * 1000])) == 301


def test_path_that_is_not_there_has_no_span() -> None:
    assert value_spans('{"a":[1]}', [("b",), ("a", 1), ("a", 0, "c")]) == {}


@pytest.mark.parametrize("depth", [1_000])
def test_deep_documents_are_walked_without_recursion(depth: int) -> None:
    text = "[" * depth + "1" + "]" * depth
    orjson.loads(text)

    assert value_spans(text, [(0,) * depth]) == {(0,) * depth: (depth, depth + 1)}


def test_overlong_text_is_not_walked() -> None:
    assert value_spans(json.dumps(["x" * MAX_TEXT_CHARS]), [(0,)]) == {}


@given(value=JSON_VALUES, indent=st.sampled_from([None, 2]), escape=st.booleans())
def test_scalars_are_the_values_that_hold_no_other(
    value: Any, indent: int | None, escape: bool
) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=escape)
    leaves = [path for path in paths_of(value) if not isinstance(at(value, path), dict | list)]

    found = list(scalars(text))

    assert [where for where, _ in found] == [pointer(path) for path in leaves]
    for (_, (start, end)), path in zip(found, leaves, strict=True):
        quoted = text[start - 1 : end + 1]
        is_inside = isinstance(at(value, path), str) and at(value, path) != ""
        assert json.loads(quoted if is_inside else text[start:end]) == at(value, path)
    assert scalar_spans(text) == [span for _, span in found]


def test_scalars_of_a_text_too_long_to_search_are_not_told() -> None:
    text = json.dumps(["x" * MAX_TEXT_CHARS])
    assert not scalar_spans(text)
    assert not list(scalars(text))
