"""RE2 patterns: what is refused and how it is said, and how long a match can be."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from validators import explain_re2, max_match_length
from validators.regex import match_widths


@pytest.mark.parametrize(
    ("pattern", "construct", "offset", "rewrite"),
    [
        ("a(?=b)", "look-ahead", 1, "match the text that follows"),
        ("a(?!b)", "negative look-ahead", 1, "(?:[^x]|$)"),
        ("(?<=a)b", "look-behind", 0, "match the text before"),
        ("(?<!a)b", "negative look-behind", 0, "(?:^|[^x])"),
        (r"(a)\1", "a back-reference", 3, "alternatives"),
        ("(?P<q>a)(?P=q)", "a back-reference", 8, "alternatives"),
        (r"(?P<q>a)\k<q>", "a back-reference", 8, "alternatives"),
        ("ba++", "a possessive repetition", 2, "write +"),
        ("a{2,3}+", "a possessive repetition", 1, "write {2,3}"),
        ("(?>a)b", "an atomic group", 0, "(?:...)"),
        ("a{1001}", "repetitions over 1000", 1, "split it"),
        ("a{2,5000}", "repetitions over 1000", 1, "split it"),
        ("(?x) a", "the flag x", 0, "remove the white space"),
        ("(?a)b", "that flag", 0, "i, m, s and U"),
        ("(?#note)a", "a comment", 0, "YAML"),
        ("(?R)", "recursion", 0, "nesting"),
        ("(?(1)a|b)", "a conditional group", 0, "alternatives"),
        (r"a\Z", r"\Z", 1, r"\z"),
        (r"[\h]", r"\h", 0, r"[ \t]"),
        (r"\u0041", r"\u", 0, r"\x{...}"),
        ("(a{100}){100}", "invalid repetition size", 8, "product of nested ones"),
        ("[a", "missing ]", 0, ""),
        ("a**", "bad repetition operator", 1, ""),
        (r"a\Cb", r"\C", 1, "(?s:.)"),
    ],
)
def test_refused_pattern_is_explained_with_place_and_rewrite(
    pattern: str, construct: str, offset: int, rewrite: str
) -> None:
    explanation = explain_re2(pattern)

    assert construct in explanation
    assert f"offset {offset}" in explanation
    assert rewrite in explanation


@pytest.mark.parametrize("pattern", ["a", r"(?i)\bfoo\b", r"(?P<n>a)", r"(?<n>\pL)", r"\Qa(?=b)\E"])
def test_accepted_pattern_has_no_explanation(pattern: str) -> None:
    assert explain_re2(pattern) == ""


def test_pattern_with_half_a_surrogate_pair_is_explained() -> None:
    assert "offset 1" in explain_re2("a\ud800")


def test_overlong_pattern_is_refused() -> None:
    assert "10001 characters" in explain_re2("a" * 10_001)


@pytest.mark.parametrize(
    ("pattern", "shortest", "longest"),
    [
        ("abc", 3, 3),
        ("(?i)colou?r|gr[ae]y{1,3}", 4, 6),
        ("a*", 0, None),
        ("(?:ab|c)+", 1, None),
        ("(?:ab|c){2,3}", 2, 6),
        ("(?:ab){2,}", 4, None),
        (r"^\bfoo\b$", 3, 3),
        (r"\Qa.b\E{2}", 4, 4),
        (r"[[:alpha:]]{3}[]a][^\]]", 5, 5),
        (r"\x{1F600}\x41\101\pL\p{Greek}", 5, 5),
        ("(?P<x>a)(?i:b)(?-i)c", 3, 3),
        ("(?:a*){0}", 0, 0),
        ("a{,5}", 5, 5),
        ("a??b", 1, 2),
        ("|ab", 0, 2),
    ],
)
def test_widths_of_a_pattern(pattern: str, shortest: int, longest: int | None) -> None:
    assert max_match_length(pattern) == longest
    assert match_widths(pattern)[0] == shortest


def test_length_of_a_refused_pattern_is_an_error() -> None:
    with pytest.raises(ValueError, match="look-ahead"):
        max_match_length("(?=a)")


_PATTERNS = st.recursive(
    st.sampled_from(["a", "b", ".", "[ab]", r"\w", r"\b", "^", "é", r"\Qab\E"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{1,3}", "{0}"])).map(
            lambda pair: f"(?:{pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=8,
)


@given(pattern=_PATTERNS, text=st.text(alphabet="abé \n", max_size=40))
def test_no_match_is_longer_than_the_longest_or_shorter_than_the_shortest(
    pattern: str, text: str
) -> None:
    if explain_re2(pattern):
        return
    shortest, longest = match_widths(pattern)

    for match in re.finditer(pattern.replace(r"\Qab\E", "(?:ab)"), text):
        assert shortest <= len(match[0]) <= longest
