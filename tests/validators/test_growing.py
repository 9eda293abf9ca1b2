"""Texts that grow: what is said of the beginning of a text holds for the whole, and is said as early as it can be."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.validators.exchanges import said, scan_of
from validators import MAX_FINDINGS, Scan, explain_re2
from validators.normalise import Growing, views
from validators.regex import compile_beginnings, match_widths

Hit = tuple[tuple[int, int], str]


def forbid(*patterns: str) -> Scan:
    return scan_of("forbid", patterns=patterns)


def whole(check: Scan, text: str) -> list[Hit]:
    """What a check finds in a text seen at once."""
    return sorted((f.span, f.rule) for f in check.run(said(text)).findings if f.span is not None)


def followed(check: Scan, parts: Iterable[str]) -> Iterable[tuple[int, int, list[Hit]]]:
    """After every part of a text: its length, what is decided, and what is found before that. Forgets all it may forget."""
    tail, cut, seen = "", 0, 0
    known: set[Hit] = set()
    for part in [*parts, None]:
        tail += part or ""
        text = Growing(tail, seen - cut, ended=part is None)
        sighting = check.follow(text, "")
        for finding in sighting.findings:
            assert finding.span is not None
            known.add(((finding.span[0] + cut, finding.span[1] + cut), finding.rule))
        yield cut + len(tail), cut + sighting.decided, sorted(known)
        seen = cut + sighting.start
        keep = text.context(sighting.start)
        cut, tail = cut + keep, tail[keep:]


# --------------------------------------------------------------------------------------- the beginning of a match


@pytest.mark.parametrize(
    ("pattern", "text", "begun"),
    [
        ("no", "yes, n", "n"),
        ("no", "yes, no", ""),
        ("no", "yes", ""),
        (r"\bno", "non", ""),
        (r"no\b", "yes, no", "no"),
        ("no$", "yes, no", "no"),
        ("(?m)no$", "no\n", ""),
        ("^no", "n", "n"),
        ("^no", "yes, n", ""),
        ("(?m)^no", "yes\nn", "n"),
        ("no+", "noo", "noo"),
        ("a{2,3}", "xaa", "aa"),
        ("a{2}b", "aaa", "aa"),
        ("(?i)(?:pass|key)word", "a KEYw", "KEYw"),
        ("(?i:K)ey", "\u212a", "\u212a"),
        ("k(?i)ey|pin", "kE", "kE"),
        ("k(?i)ey|pin", "PI", "PI"),
        ("(?:k(?i)ey)s", "KE", ""),
        (r"\Qa.b\Ec", "xa.b", "a.b"),
        (r"\Qa.b\Ec", "xacb", ""),
        ("[^a-z]x", "no!", "!"),
        (r"\d{3}-\d{2}", "tel 555-1", "555-1"),
        ("(?:ab|a{2}c)d?", "aa", "aa"),
        ("(?P<year>20\\d\\d)", "in 20", "20"),
        ("a{,5}", "a{,", "a{,"),
        ("a{(?i)2}b", "a{2}", "a{2}"),
        ("(?s).é", "\n", "\n"),
        ("x(?:|y)z", "xy", "xy"),
        ("x(?:y{0})z", "xy", ""),
    ],
)
def test_end_of_a_text_that_may_become_a_match(pattern: str, text: str, begun: str) -> None:
    beginnings = compile_beginnings([pattern])
    assert beginnings is not None

    match = beginnings.search(text)

    assert match is not None
    assert match[0] == begun


@given(
    words=st.lists(st.text(alphabet="ab.é", min_size=1, max_size=6), min_size=1, max_size=3),
    text=st.text(alphabet="ab.é", max_size=12),
)
def test_only_what_may_become_a_match_is_a_beginning(words: list[str], text: str) -> None:
    beginnings = compile_beginnings([rf"\Q{word}\E" for word in words])
    ends = {word[:size] for word in words for size in range(len(word))}
    longest = max((end for end in ends if text.endswith(end)), key=len)

    assert beginnings is not None
    match = beginnings.search(text)
    assert match is not None
    assert match[0] == longest


def test_beginnings_too_large_to_run_fast_are_none() -> None:
    assert compile_beginnings(["(?:a{1000}b{1000}){1}" * 20]) is None
    assert compile_beginnings(["(?:" * 900 + "ab|cd" + ")" * 900]) is not None


# ------------------------------------------------------------------------------------------------ growing texts

_ATOMS = [
    "a",
    "b",
    "k",
    "é",
    "1",
    ".",
    " ",
    "[ab]",
    "[^a]",
    r"\w",
    r"\W",
    r"\d",
    r"\n",
    r"\pM",
    r"\Qab\E",
]
_ATOMS += [r"\b", r"\B", "^", "$", "(?m:^)", "(?m:$)", r"\A", r"\z", "(?i)K", "ﬁ"]
_PATTERNS = st.recursive(
    st.sampled_from(_ATOMS),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.tuples(st.sampled_from(["", "?:", "?i:", "?s:"]), st.lists(inner, min_size=1, max_size=3)).map(
            lambda drawn: f"({drawn[0]}{'|'.join(drawn[1])})"
        ),
        st.tuples(inner, st.sampled_from(["?", "*", "+", "+?", "{2}", "{1,3}", "{0,2}", "{2,}"])).map(
            lambda drawn: f"(?:{drawn[0]}){drawn[1]}"
        ),
    ),
    max_leaves=8,
).filter(lambda pattern: not explain_re2(pattern) and match_widths(pattern)[0] > 0)  # fmt: skip

#: Letters that patterns name, and what changes how they read: marks, hidden and wide characters, escapes whole and cut.
_CHARS = [
    "a",
    "b",
    "k",
    "K",
    "1",
    " ",
    "\n",
    "é",
    "ﬁ",
    "e",
    "日",
    "😀",
    "ａ",
    "\u0301",
    "\u0323",
    "\u200b",
]
_CHARS += ["\\", "\\u00", "61", "\\u00e9", "\\n", "\\\\", "\\ud83d\\ude00", "\\ud83d"]
_TEXTS = st.lists(st.sampled_from(_CHARS), max_size=12).map("".join)


@st.composite
def parts(draw: st.DrawFn, texts: st.SearchStrategy[str] = _TEXTS) -> list[str]:
    """A text cut into pieces."""
    text = draw(texts)
    cuts = sorted(draw(st.sets(st.integers(0, len(text)), max_size=8)))
    return [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]


def assert_followed_is_whole(check: Scan, pieces: Sequence[str]) -> None:
    hits = whole(check, "".join(pieces))
    assume(len(hits) < MAX_FINDINGS)
    before = 0
    for length, decided, found in followed(check, pieces):
        assert before <= decided <= length
        assert found == [hit for hit in hits if hit[0][0] < decided]
        assert all(end <= length for (_, end), _ in found)
        before = decided
    assert found == hits


@settings(max_examples=600, deadline=None)
@given(st.lists(_PATTERNS, min_size=1, max_size=3, unique=True), parts())
def test_what_is_decided_of_a_growing_text_is_what_the_whole_says(
    patterns: list[str], pieces: list[str]
) -> None:
    assert_followed_is_whole(forbid(*patterns), pieces)


_PERSONAL = [
    "4242 4242 4242 4242",
    "4242424242424242",
    "1",
    " 12",
    "ada@example.com",
    "@",
    ".",
    "com",
    "x",
    "é",
    ", ",
]
_PERSONAL += [
    "GB82 WEST 1234 5698 7654 32",
    "+49 30 901820",
    "8.8.8.8",
    "078-05-1120",
    "password=",
    "hunter2abc9",
]


_CHECKS = (
    scan_of("pii", kinds=("card", "iban", "email", "phone", "us_ssn", "ip")),
    scan_of("pii", kinds=("phone",), region="DE"),
    scan_of("secrets", kinds=("generic", "aws")),
)


@settings(max_examples=300, deadline=None)
@given(parts(st.lists(st.sampled_from(_PERSONAL), max_size=6).map("".join)))
def test_what_is_decided_of_personal_data_and_secrets_is_what_the_whole_says(
    pieces: list[str],
) -> None:
    for check in _CHECKS:
        assert_followed_is_whole(check, pieces)


@pytest.mark.parametrize("patterns", [("kill", r"\bkilo\b"), ("(?i)k[a-z]{2,30}!",), (r"\d{3}",)])
@given(pieces=parts(st.text(alphabet="abe. é日ü", max_size=30)))
def test_text_in_which_nothing_can_begin_is_decided_at_once(
    patterns: tuple[str, ...], pieces: list[str]
) -> None:
    for length, decided, found in followed(forbid(*patterns), pieces):
        assert decided == length
        assert not found


@pytest.mark.parametrize(
    ("text", "decided"),
    [
        ("so", 0),
        ("so ", 3),
        ("sü", 0),
        ("s1", 2),
        ("s\\", 0),
        ("x\\u00", 1),
        ("x\\ud83d", 1),
        ("x\\u0041", 7),
        ("xo", 1),
        ("x\u0301", 2),
    ],
)
def test_what_marks_and_escapes_may_still_change_is_undecided(text: str, decided: int) -> None:
    check = forbid("só", "ò")

    assert check.follow(Growing(text), "").decided == decided


def test_patterns_too_large_together_hold_back_the_longest_match() -> None:
    check = forbid("(?:a{500}b{500}){1}" * 2, *(f"{'xy' * 400}{number}" for number in range(150)))

    assert check.follow(Growing("c" * 5_000), "").decided == 5_000 - 2_000 - 2
    assert check.follow(Growing("c" * 5_000, ended=True), "").decided == 5_000


def test_no_more_is_undecided_than_the_longest_match() -> None:
    check = scan_of("pii", kinds=("email",))

    assert check.follow(Growing("x" * 1_000), "").decided == 1_000 - 318 - 2


def test_flood_of_near_misses_is_told() -> None:
    sighting = scan_of("pii", kinds=("card",)).follow(Growing("4 " * 20_000), "")

    assert sighting.flooded


@given(text=_TEXTS, more=_TEXTS)
def test_views_keep_what_is_settled_when_the_text_goes_on(text: str, more: str) -> None:
    growing = Growing(text)
    settled = min(growing.settled, growing.cut)
    longer = Growing(text + more)

    before = [view.text[: view.position(settled)] for view in growing.views]
    after = [view.text for view in longer.views]
    assert all(any(text.startswith(known) for text in after) for known in before)
    assert all(any(text.startswith(known) for known in before) for text in after)


@given(_TEXTS)
def test_position_leads_to_the_first_character_from_there_on(text: str) -> None:
    for view in views(text, is_json=False):
        begins = [view.original(index, index + 1)[0] for index in range(len(view.text))]
        for offset in range(len(text) + 1):
            behind = [index for index, begin in enumerate(begins) if begin >= offset]
            assert view.position(offset) == (behind[0] if behind else len(view.text))
