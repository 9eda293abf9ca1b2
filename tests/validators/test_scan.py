"""Searching text: nothing that matches gets away, hostile text takes no time, and what is masked stays JSON."""

from __future__ import annotations

import json
import re
from time import process_time
from typing import Any

import orjson
import pytest
import re2
from hypothesis import given
from hypothesis import strategies as st

from tests.validators.exchanges import called, check_of, covered, exchange_of, said, scan_of
from validators import MAX_FINDINGS, CheckResult, Exchange, Outcome, Scan
from validators.scan import Rule, Scanner


def forbid(*patterns: str) -> Scan:
    return scan_of("forbid", patterns=patterns)


def masked(exchange: Exchange, result: CheckResult) -> str:
    """The first text of the exchange with every finding replaced, overlaps merged."""
    (passage,) = exchange.choices[0].texts or (exchange.choices[0].tool_calls[0].arguments,)
    pieces, done = [], 0
    for finding in sorted(result.findings, key=lambda finding: finding.span or (0, 0)):
        assert finding.span is not None
        assert finding.replacement is not None
        start, end = finding.span
        if start >= done:
            pieces += [passage.text[done:start], finding.replacement]
        done = max(done, end)
    return "".join(pieces) + passage.text[done:]


@given(
    text=st.text(alphabet="abé😀 ", max_size=60),
    patterns=st.lists(st.sampled_from(["a+", "b", "é", "😀a", "ab|ba"]), min_size=1, unique=True),
)
def test_findings_are_the_matches_of_each_pattern(text: str, patterns: list[str]) -> None:
    expected = sorted(
        (*match.span(), f"pattern_{number}")
        for number, pattern in enumerate(patterns, start=1)
        for match in re.finditer(pattern, text)
    )

    result = forbid(*patterns).run(said(text))

    found = sorted((*(finding.span or ()), finding.rule) for finding in result.findings)
    if len(expected) < MAX_FINDINGS:
        assert found == expected


def test_no_match_is_left_when_there_are_too_many() -> None:
    exchange = said("secret 1, " * 10_000)

    result = forbid("secret [0-9]").run(exchange)

    assert len(result.findings) == MAX_FINDINGS
    assert "secret" not in masked(exchange, result)


def test_no_match_is_left_in_the_passages_after_the_last_finding() -> None:
    exchange = exchange_of({"choices": [{"text": "secret " * 3}] * 200})

    result = forbid("secret").run(exchange)

    assert len(result.findings) <= MAX_FINDINGS + 200
    assert {finding.path for finding in result.findings} == {
        f"choices[{number}].message.content" for number in range(200)
    }


def test_matches_of_two_patterns_compete_for_room_by_place() -> None:
    exchange = said("first " + "aa " * 100 + "last")

    result = forbid("aa", "last", "first").run(exchange)

    assert "last" not in masked(exchange, result)
    assert "aa" not in masked(exchange, result)


@given(
    value=st.recursive(
        st.integers(0, 10**6) | st.text(alphabet='ab"\\é\n1', max_size=6) | st.booleans(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text(alphabet="ab1", max_size=3), inner, max_size=3)
        ),
        max_leaves=12,
    ).map(lambda value: {"root": value}),
    pattern=st.sampled_from(["1", "a", '",', "[0-9]{2}", ":", "b.*a"]),
    escape=st.booleans(),
)
def test_masked_json_is_json_without_the_matches(value: Any, pattern: str, escape: bool) -> None:
    text = json.dumps(value, ensure_ascii=escape)
    check = scan_of("redact", patterns=pattern, replacement='"\\X')
    exchange = called(text)

    result = check.run(exchange)

    orjson.loads(masked(exchange, result))


def test_match_seen_as_written_and_as_normalised_is_one_finding() -> None:
    result = forbid("word").run(said("word \ufb01 word"))

    assert [finding.span for finding in result.findings] == [(0, 4), (7, 11)]


def test_prefilter_that_gives_up_is_not_taken_for_no_match() -> None:
    scanner = Scanner([Rule("first", "one", "", ""), Rule("second", "two", "", "")])
    silent = re2.Set.SearchSet()
    silent.Compile()
    scanner._prefilter = silent

    (view,) = said("two").choices[0].texts[0].views()

    assert list(scanner.matching(view)) == [1]


def test_text_with_half_a_surrogate_pair_is_searched() -> None:
    result = forbid("word").run(said("\ud800 word"))

    assert [finding.span for finding in result.findings] == [(2, 6)]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"use": "forbid", "patterns": ["a(?=b)"]}, "look-ahead"),
        ({"use": "forbid", "patterns": ["a*"]}, "matches even where there is no text"),
        ({"use": "forbid", "patterns": [r"\b"]}, "matches even where there is no text"),
        ({"use": "forbid", "patterns": []}, "at least 1 item"),
        ({"use": "forbid", "patterns": [{"name": "a b", "pattern": "x"}]}, "pattern"),
        ({"use": "forbid", "patterns": ["x", {"name": "pattern_1", "pattern": "y"}]}, "pattern_1"),
        ({"use": "forbid", "patterns": ["x"], "paterns": ["y"]}, "Extra inputs"),
        ({"use": "forbid", "patterns": ["(?:a{1000}b{1000}){1}" * 400]}, "too large"),
        ({"use": "require", "patterns": ["x"], "on_fail": "redact"}, "no spans to redact"),
        ({"use": "secrets", "kinds": ["aws", "azure"]}, "kinds"),
        ({"use": "pii", "region": "XX"}, "no region"),
        ({"use": "pii", "region": "DE", "kinds": ["card"]}, "add phone"),
        ({"use": "length"}, "no limit"),
        ({"use": "length", "min_chars": 5, "max_chars": 4}, "nothing can pass"),
        ({"use": "tool_calls", "min": 2, "max": 1}, "nothing can pass"),
        ({"use": "tool_calls", "forbid": ["pay*"], "required": ["pay_now"]}, "nothing can pass"),
        ({"use": "tool_calls", "allow": ["get_*"], "required": ["pay"]}, "nothing can pass"),
    ],
)
def test_wrong_configuration_is_refused_at_load(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        check_of(**config)


@pytest.mark.parametrize(
    ("check", "longest"),
    [
        (forbid("abc", "de?"), 3),
        (forbid("abc", "d+"), None),
        (scan_of("pii", kinds=("email",)), 318),
        (scan_of("pii", kinds=("card",)), 37),
        (scan_of("secrets", kinds=("aws",)), 20),
        (scan_of("secrets"), None),
    ],
)
def test_longest_match_of_a_check(check: Scan, longest: int | None) -> None:
    assert check.longest_match == longest


def test_findings_of_secrets_and_personal_data_never_quote_them() -> None:
    text = 'password="hunter2abc9" 4242424242424242 bob@mail.org DE89370400440532013000'
    for check in (scan_of("secrets"), scan_of("pii")):
        exchange = said(text)
        result = check.run(exchange)
        shown = " ".join(f"{f.message} {f.rule} {f.replacement} {f.path}" for f in result.findings)
        assert result.findings
        assert not any(secret in shown for secret in covered(exchange, result))


HOSTILE = {
    "letters": "a" * 1_000_000,
    "digits": "4" * 1_000_000,
    "spaced digits": "4 " * 500_000,
    "groups of digits": "4444 " * 200_000,
    "words": "ab12 " * 200_000,
    "ibans": "DE12" * 250_000,
    "plus signs": "+49 30 1" * 125_000,
    "phone numbers": "+4930901820, " * 77_000,
    "addresses": "a@b.c " * 166_000,
    "at signs": "a@" * 500_000,
    "long domain": "a@" + "b." * 500_000,
    "colons": "::" * 500_000,
    "keys": "-----BEGIN PRIVATE KEY-----" * 37_000,
    "assignments": "password=" * 111_000,
    "assigned": "password=aaaaaaa1 " * 55_000,
    "tokens": "eyJ" * 333_000,
    "dotted tokens": "eyJaaaaaaaa.aaaa." * 58_000,
    "backslashes": "\\" * 1_000_000,
    "escapes": "\\u0061" * 166_000,
    "marks": "a" + "\u0301\u0316" * 500_000,
    "hidden": "\u200b" * 1_000_000,
    "ligatures": "\ufdfa" * 330_000,
    "kanji and full width": "日，" * 333_000,
    "many letters": "".join(map(chr, range(0x3400, 0x9FFF))) * 12,
    "json strings": json.dumps(["\u00e9\n" * 3] * 40_000),
    "json numbers": json.dumps([4242424242424242] * 50_000),
    "deep json": "[" * 1_000 + "4242424242424242" + "]" * 1_000,
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
@pytest.mark.parametrize(
    "check",
    [
        forbid(r"(a+)+b", r"(?:a|aa)+$", r"a.*b|a", r"(x+x+)+y", r"(?i)p\w*\s+k\w*\s+z"),
        scan_of("secrets"),
        scan_of("pii", kinds=("card", "iban", "email", "phone", "us_ssn", "ip")),
        scan_of("pii", kinds=("phone",), region="US"),
    ],
    ids=["forbid", "secrets", "pii", "phone"],
)
def test_hostile_megabyte_is_searched_in_bounded_time(check: Scan, text: str) -> None:
    exchange = said(text)

    started = process_time()
    result = check.run(exchange)

    assert process_time() - started < 2.0
    assert result.outcome in (Outcome.PASS, Outcome.FAIL)
