"""Editing a document where only one value is to change."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from policies.source import PolicyError, Source

NEW = "{from_calibrator: true}"


@pytest.mark.parametrize(
    ("text", "path", "written", "edited"),
    [
        ("a: {b: c, d: e}  # why\n", "a.b", "x", "a: {b: x, d: e}  # why\n"),
        ("a: {d: e}\n", "a.b", "x", "a: {b: x, d: e}\n"),
        ("a:\n  # why\n  d: e\n", "a.b", "x", "a:\n  # why\n  d: e\n  b: x\n"),
        ("a:\n  d: e", "a.b", "x", "a:\n  d: e\n  b: x\n"),
        ("# top\np: q # why\nz: 1\n", "t", NEW, f"# top\np: q # why\nz: 1\nt: {NEW}\n"),
        ("t:\n  c: 0.9 # why\n  u: 1\n\n# z\nz: 1\n", "t", NEW, f"t: {NEW}\n\n# z\nz: 1\n"),
        ("a:\n  w: >-\n    x\n    y\nz: 1\n", "a.b", "x",
         "a:\n  w: >-\n    x\n    y\n  b: x\nz: 1\n"),
        ("t: 'old'\n", "t", NEW, f"t: {NEW}\n"),
    ],
)  # fmt: skip
def test_one_value_changes_and_nothing_else(
    text: str, path: str, written: str, edited: str
) -> None:
    assert Source(text, "f").edited(tuple(path.split(".")), written) == edited


@pytest.mark.parametrize(
    ("text", "path"),
    [("a: &x {b: 1}\nc: *x\n", ("c", "b")), ("a: [1]\n", ("a", "b")), ("a: {}\n", ("a", "b"))],
    ids=["alias", "list", "empty"],
)
def test_what_cannot_be_edited_alone_is_refused_with_its_place(
    text: str, path: tuple[str, ...]
) -> None:
    with pytest.raises(PolicyError, match=r"f:[12]:\d+: .*write 'b: x' here|cannot be edited"):
        Source(text, "f").edited(path, "x")


_KEYS = st.sampled_from(["a", "b", "c", "d"])
_VALUES = st.recursive(
    st.sampled_from([1, 2.5, True, None, "word", "two words", "# no comment"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=3),
)


@given(
    document=st.dictionaries(_KEYS, _VALUES, min_size=1),
    key=_KEYS,
    flow=st.sampled_from([True, False, None]),
)
def test_any_document_has_the_new_value_and_the_rest_of_the_old(
    document: dict[str, object], key: str, flow: bool | None
) -> None:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = flow
    with io.StringIO() as out:
        yaml.dump(document, out)
        text = out.getvalue()
    assert Source(Source(text, "f").edited((key,), NEW), "f").data == {
        **document,
        key: {"from_calibrator": True},
    }
