from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from policies.expressions import VARIABLES, Variables
from policies.loading import json_schema, load_policies, load_policy
from policies.match import Facts, PolicySet
from policies.model import Policy, RiskTier, StreamMode
from policies.risk import assess
from policies.source import MAX_BYTES, PolicyError, Problem
from policies.streaming import effective_stream
from validators import Choice, Exchange, Passage, ToolCall

CONFIG = Path(__file__).parents[2] / "config"
STARTERS = sorted((CONFIG / "policies").glob("*.yaml"))
END = "\nconfidence: {when_uncalibrated: hold}\n"


def unreadable(path: str) -> str:
    raise FileNotFoundError(2, "No such file or directory", path)


def load(text: str, read: Callable[[str], str] = unreadable) -> Policy:
    return load_policy(text, file="p.yaml", read=read)


def problems(text: str) -> list[str]:
    with pytest.raises(PolicyError) as caught:
        load(text)
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return str(caught.value).splitlines()


def warnings(text: str) -> list[str]:
    return [str(each) for each in load_policies([("p.yaml", text)], read=unreadable).warnings]


def places(marked: str) -> tuple[str, list[str]]:
    """The text without its marks `§`, and `file:line:column:` of what follows each of them."""
    parts = marked.split("§")
    found = []
    for index in range(1, len(parts)):
        before = "".join(parts[:index])
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        found.append(f"p.yaml:{line}:{column}:")
    return "".join(parts), found


def refused(marked: str, *messages: str) -> None:
    text, found = places(marked)
    expected = [f"{place} {message}" for place, message in zip(found, messages, strict=True)]
    assert problems(text) == expected


P = "policy: p" + END

MISTAKES = {
    "unknown key": (P + "§stagez: []", "unknown key 'stagez'; did you mean 'stages'?"),
    "unknown key like none": (
        P + "audit: {§zzz: 1}",
        "unknown key 'zzz'; known are rate, adaptive",
    ),
    "unknown nested key": (
        P + "match:\n  any:\n    - {§tsak: refund}",
        "unknown key 'tsak'; did you mean 'task'?",
    ),
    "unknown key of a check": (
        P + "stages:\n  - name: a\n    checks:\n      - {id: x, use: secrets, §on_fial: block}",
        "unknown key 'on_fial'; did you mean 'on_fail'?",
    ),
    "unknown key of a matrix cell": (
        P + "matrix: {low: {confident: {action: flag, §audi: 1}, unsure: flag, doubtful: hold}}",
        "unknown key 'audi'; did you mean 'audit'?",
    ),
    "name the model has but YAML has not": (
        P + "hold: {§as_: error}",
        "unknown key 'as_'; did you mean 'as'?",
    ),
    "unknown check": (
        P + "stages: [{name: a, checks: [{id: x, use: §secret}]}]",
        "unknown check 'secret'; did you mean 'secrets'?",
    ),
    "check that does not say its kind": (
        P + "stages: [{name: a, checks: [§{id: x}]}]",
        "missing key 'use', which says what kind of check this is",
    ),
    "unknown word of an enum": (
        P + "stages: [{name: a, checks: [{id: x, use: secrets, on_fail: §blok}]}]",
        "'blok' is not one of the words allowed; did you mean 'block'?",
    ),
    "unknown word of a literal": (
        "policy: p\nconfidence: {when_uncalibrated: §maybe}",
        "'maybe' is not one of the words allowed; known are return, flag, hold",
    ),
    "unknown tier": (
        P + "risk: {base: §hihg}",
        "'hihg' is not one of the words allowed; did you mean 'high'?",
    ),
    "unknown action in the matrix": (
        P + "matrix: {low: {confident: §retrun, unsure: flag, doubtful: hold}}",
        "'retrun' is not one of the words allowed; did you mean 'return'?",
    ),
    "missing key": ("§policy: p", "missing key 'confidence'"),
    "missing key of a row": (
        P + "matrix:\n  low: §{confident: flag, unsure: flag}",
        "missing key 'doubtful'",
    ),
    "not a name": (
        "policy: §Refunds!" + END,
        "'Refunds!' is not a name: a letter, then up to 63 of a-z, 0-9, _",
    ),
    "number where text is due": (
        P + "match: {task: §5}",
        "must be text (in quotes, if it looks like a number), not 5",
    ),
    "text where a number is due": (P + "version: §one", "must be a whole number, not 'one'"),
    "broken number": (P + "regenerate: {attempts: §1.5}", "must be a whole number, not 1.5"),
    "number too large": (P + "thresholds: {confident: §1.5}", "must be at most 1.0, not 1.5"),
    "number too small": (P + "regenerate: {attempts: §-1}", "must be at least 0, not -1"),
    "not a number": (P + "audit: {rate: §.nan}", "must be at most 1.0, not nan"),
    "list where a mapping is due": (
        P + "hold: §[1]",
        "must be a mapping of keys to values, not a list",
    ),
    "mapping where a list is due": (P + "stages: §{a: b}", "must be a list, not a mapping"),
    "key without a value": (
        P + "§hold:\nversion: 2",
        "must be a mapping of keys to values, not nothing",
    ),
    "empty list": (
        P + "stages: [{name: a, checks: §[]}]",
        "must be at least 1 long, not an empty list",
    ),
    "duration without a unit": (
        P + "hold: {wait: §50}",
        "50 has no unit; write 50s, 50m or 50h",
    ),
    "duration in words": (
        P + "hold: {wait: §5 minutes}",
        "'5 minutes' is not a duration; write a number and a unit, such as 50s, 30m or 4h",
    ),
    "thresholds the wrong way round": (
        P + "thresholds: {confident: 0.5, unsure: §0.6}",
        "unsure (0.6) must not be above confident (0.5)",
    ),
    "redaction by a check without spans": (
        P + "stages: [{name: a, checks: [{id: x, use: length, max_chars: 5, on_fail: §redact}]}]",
        "this check has no spans to redact; write on_fail: hold, flag or block",
    ),
    "length without a limit": (
        P + "stages: [{name: a, checks: [§{id: x, use: length}]}]",
        "no limit is given; write one of min_chars, max_chars, min_words, max_words, max_lines",
    ),
    "neither of several kinds": (
        P + "stages: [{name: a, checks: [{id: x, use: json_schema, schema: §5}]}]",
        "must be a mapping of keys to values or true or false or "
        "text (in quotes, if it looks like a number), not 5",
    ),
    "pattern RE2 does not run": (
        P + "stages: [{name: a, checks: [{id: x, use: forbid, patterns: [a, §'(?=b)c']}]}]",
        "RE2 does not know look-ahead (`(?=` at offset 0): match the text that follows as part of "
        "the pattern, or end it with \\b",
    ),
    "document that is no mapping": ("§- a", "must be a mapping of keys to values, not a list"),
    "variable in a plain scalar": (
        P + "risk:\n  raise:\n    - to: high\n      when: true && §scor < 0.5",
        "unknown variable 'scor'; did you mean 'score'?",
    ),
    "variable after a doubled quote": (
        P + "risk: {raise: [{to: high, when: 'task == ''a'' && §scor < 0.5'}]}",
        "unknown variable 'scor'; did you mean 'score'?",
    ),
    "variable after escapes": (
        P + 'risk: {raise: [{to: high, when: "task == \\"\\u0041\\x41\\" && §scor < 0.5"}]}',
        "unknown variable 'scor'; did you mean 'score'?",
    ),
    "variable in a folded scalar": (
        P + "risk:\n  raise:\n    - to: high\n      when: §>\n        true &&\n        scor < 0.5",
        "unknown variable 'scor'; did you mean 'score'?",
    ),
    "variable in a condition of a stage": (
        P + "stages: [{name: a, when: '§confidnce < 0.5', checks: [{id: x, use: secrets}]}]",
        "unknown variable 'confidnce'; did you mean 'confidence'?",
    ),
    "check id in an expression": (
        P + "risk: {raise: [{to: high, when: §checks.seecrets.failed}]}\n"
        "stages: [{name: a, checks: [{id: secrets, use: secrets}]}]",
        "unknown variable 'checks.seecrets.failed'; did you mean 'checks.secrets.failed'?",
    ),
    "tier in an expression": (
        P + "risk: {raise: [{to: high, when: risk >= §high}]}",
        "unknown variable 'high'; did you mean 'HIGH'?",
    ),
    "type error in an expression": (
        P + "risk: {raise: [{to: high, when: score §< 1}]}",
        "'<' cannot be applied to double and int; "
        "write whole numbers with a decimal point, such as 1.0",
    ),
    "expression that is not true or false": (
        P + "risk: {raise: [{to: high, when: §score}]}",
        "has type double, not bool; compare it with something",
    ),
    "duplicate key": (
        P + "version: 1\n§version: 2",
        "the key 'version' is already given on line 3",
    ),
    "merge key": (P + "audit: {§<<: {rate: 1}}", "'<<' is not supported; write the keys out"),
    "key that is no text": (P + "audit: {§[1]: 2}", "a key must be plain text"),
    "tagged value": (
        P + "version: §!!python/name:os 1",
        "'1' is no value Holdgate knows; quote it if it is text",
    ),
    "number beyond 64 bits": (
        P + "version: §99999999999999999999",
        "'99999999999999999999' is no value Holdgate knows; quote it if it is text",
    ),
    "broken YAML": (P + "match: a§: b", "mapping values are not allowed here"),
    "unclosed YAML": ("policy: [§", "expected the node content, but found '<stream end>'"),
    "undefined alias": ("policy: §*p", "found undefined alias 'p'"),
    "two documents": (
        "policy: p\n§---\nb",
        "expected a single document in the stream, but found another document",
    ),
    "control character": ("policy: p\nversion: §\x00", "the character U+0000 is not allowed"),
    "escape beyond Unicode": (
        '§policy: "\\UFFFFFFFF"',
        "not YAML 1.2: Python int too large to convert to C int",
    ),
    "version of YAML there is not": (
        "§%YAML 1.99\n---\na: 1",
        "not YAML 1.2: version minor part can only be 2 or 1, got (1, 99)",
    ),
    "half a character": (
        'policy: §"\\ud800"' + END,
        "'\\ud800' is no value Holdgate knows; quote it if it is text",
    ),
    "half a character in a key": (P + 'audit: {§"\\ud800": 1}', "a key must be plain text"),
    "empty file": ("§# nothing", "the file is empty"),
    "duplicate check id": (
        P + "stages:\n  - {name: a, checks: [{id: x, use: secrets}]}\n"
        "  - {name: b, checks: [{id: §x, use: pii}]}",
        "a check with the id 'x' is already there",
    ),
    "duplicate stage": (
        P + "stages:\n  - {name: a, checks: [{id: x, use: secrets}]}\n"
        "  - {name: §a, checks: [{id: y, use: pii}]}",
        "a stage 'a' is already there",
    ),
    "regenerate without attempts": (
        P + "stages: [{name: a, checks: [{id: x, use: secrets, on_fail: §regenerate}]}]",
        "regenerate needs 'regenerate: {attempts: 1}' or more",
    ),
    "condition on a check that runs later": (
        P + "stages:\n  - {name: a, when: §checks.x.failed, checks: [{id: x, use: secrets}]}",
        "check 'x' has not run by then; refer to checks of earlier stages",
    ),
}


@pytest.mark.parametrize(("marked", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_mistake_is_reported_in_plain_words_where_it_is(marked: str, message: str) -> None:
    refused(marked, message)


def test_every_mistake_is_reported_at_once_in_the_order_of_the_file() -> None:
    refused(
        "policy: §5\n§stagez: []\nrisk:\n  base: §hihg\n"
        "  raise:\n    - {to: high, when: §scor < 0.5}\n    - §{to: high, §wen: 'true'}\n"
        "confidence: {when_uncalibrated: hold}\n§policy: q\n",
        "must be text (in quotes, if it looks like a number), not 5",
        "unknown key 'stagez'; did you mean 'stages'?",
        "'hihg' is not one of the words allowed; did you mean 'high'?",
        "unknown variable 'scor'; did you mean 'score'?",
        "missing key 'when'",
        "unknown key 'wen'; did you mean 'when'?",
        "the key 'policy' is already given on line 1",
    )


STREAMED = """policy: p
stream: {mode}
stages:
  - name: a
    checks: [{{id: x, use: {check}, on_fail: {on_fail}, on_error: {on_error}}}]
confidence: {{when_uncalibrated: {uncalibrated}}}
"""


def streamed(
    mode: str,
    *,
    on_fail: str = "flag",
    on_error: str = "flag",
    uncalibrated: str = "flag",
    check: str = "forbid, patterns: 'a{3}'",
    end: str = "",
) -> str:
    return (
        STREAMED.format(
            mode=mode, on_fail=on_fail, on_error=on_error, uncalibrated=uncalibrated, check=check
        )
        + end
    )


@pytest.mark.parametrize("on_fail", ["block", "hold", "redact", "regenerate"])
def test_observed_streams_refuse_a_check_that_enforces(on_fail: str) -> None:
    text = streamed("observe", on_fail=f"§{on_fail}", end="regenerate: {attempts: 1}\n")
    message = (
        f"'stream: observe' cannot honour 'on_fail: {on_fail}' of check 'x'; use 'stream: auto'"
    )
    refused(text, message)


@pytest.mark.parametrize("mode", ["window", "observe"])
def test_streams_that_do_not_wait_refuse_whatever_may_hold(mode: str) -> None:
    start = f"'stream: {mode}' cannot honour "
    end = "; use 'stream: auto'"
    refused(streamed(mode, on_error="§hold"), f"{start}'on_error: hold' of check 'x'{end}")
    refused(streamed(mode, uncalibrated="§hold"), f"{start}when_uncalibrated: hold{end}")
    calibrated = streamed(mode).replace("{when", "{calibrator: c, when")
    refused(
        calibrated.replace("policy", "§policy"), f"{start}'hold' for tier medium, doubtful{end}"
    )
    refused(
        streamed(mode, end="risk: {base: low, raise: [{to: critical, when: 'true'}]}\n").replace(
            "policy", "§policy"
        ),
        f"{start}'hold' for tier critical, confident{end}",
    )


def test_windowed_streams_refuse_to_block_on_matches_without_a_bound() -> None:
    message = "'stream: window' cannot honour 'on_fail: block' of check 'x'; use 'stream: auto'"
    refused(streamed("window", on_fail="§block", check="forbid, patterns: 'a+'"), message)
    refused(streamed("window", on_fail="§block", check="length, max_chars: 5"), message)


@pytest.mark.parametrize("on_fail", ["block", "redact", "flag", "score"])
def test_windowed_streams_do_what_bounded_patterns_ask_for(on_fail: str) -> None:
    assert effective_stream(load(streamed("window", on_fail=on_fail))) is StreamMode.WINDOW


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (streamed("auto"), StreamMode.OBSERVE),
        (streamed("auto", on_fail="score"), StreamMode.OBSERVE),
        (streamed("auto", on_fail="block"), StreamMode.WINDOW),
        (streamed("auto", on_error="block"), StreamMode.WINDOW),
        (streamed("auto", on_fail="redact"), StreamMode.WINDOW),
        (streamed("auto", on_fail="redact", check="pii"), StreamMode.WINDOW),
        (streamed("auto", on_fail="block", check="forbid, patterns: 'a+'"), StreamMode.BUFFER),
        (streamed("auto", on_fail="block", check="length, max_chars: 5"), StreamMode.BUFFER),
        (streamed("auto", on_error="hold"), StreamMode.BUFFER),
        (streamed("auto", uncalibrated="hold"), StreamMode.BUFFER),
        (streamed("auto", end="risk: {base: critical}\n"), StreamMode.BUFFER),
        (streamed("buffer"), StreamMode.BUFFER),
        (streamed("auto", on_fail="hold", end="mode: observe\n"), StreamMode.OBSERVE),
        (streamed("window", on_fail="hold", end="mode: observe\n"), StreamMode.OBSERVE),
        (streamed("buffer", on_fail="hold", end="mode: observe\n"), StreamMode.BUFFER),
    ],
)
def test_streams_are_checked_as_fast_as_the_policy_allows(text: str, expected: StreamMode) -> None:
    policy = load(text)
    assert effective_stream(policy) is expected
    assert effective_stream(policy) is expected


def test_check_in_a_conditional_stage_cannot_act_on_a_window() -> None:
    text = streamed("auto", on_fail="block").replace("name: a", "name: a\n    when: 'risk >= LOW'")
    assert effective_stream(load(text)) is StreamMode.BUFFER


WARNINGS = {
    "release of what may be critical": (
        P + "risk: {base: critical}\nhold: {on_deadline: §release}",
        "responses of tier critical are never released; at the deadline they are rejected",
    ),
    "threshold everything passes": (
        P + "thresholds: {confident: §0, unsure: 0}",
        "with 0 every response of tier medium is confident",
    ),
    "threshold of one tier": (
        P + "thresholds: {medium: {confident: §0, unsure: 0}}",
        "with 0 every response of tier medium is confident",
    ),
    "matrix milder for a higher tier": (
        P + "matrix: {high: {confident: return, unsure: §return, doubtful: hold}}",
        "'return' for high is milder than 'flag' for medium",
    ),
    "rule that raises nothing": (
        P + "risk: {base: high, raise: [{to: §medium, when: 'true'}]}",
        "never raises anything: the base is already high",
    ),
    "confidence without a calibrator": (
        P + "risk: {raise: [{to: high, when: §confidence < 0.5}]}",
        "confidence is never known without 'confidence: {calibrator: ...}'",
    ),
}


@pytest.mark.parametrize(("marked", "message"), WARNINGS.values(), ids=WARNINGS.keys())
def test_what_can_hardly_be_meant_is_warned_of(marked: str, message: str) -> None:
    text, (place,) = places(marked)
    assert warnings(text) == [f"{place} {message}"]


def test_policy_after_a_catch_all_is_warned_of() -> None:
    first, second = "policy: a" + END, "policy: b\nmatch: {task: x}" + END
    loaded = load_policies([("a.yaml", first), ("b.yaml", second)], read=unreadable)
    expected = "b.yaml:2:1: never used: policy 'a' before it matches every request"
    assert [str(each) for each in loaded.warnings] == [expected]
    assert [policy.policy for policy in loaded.policies] == ["a", "b"]
    assert load_policies([("b.yaml", second), ("a.yaml", first)], read=unreadable).warnings == ()


def test_two_policies_of_one_name_are_refused_naming_both_places() -> None:
    files = [("a.yaml", "policy: same" + END), ("b.yaml", "version: 1\npolicy: same" + END)]
    with pytest.raises(PolicyError) as caught:
        load_policies(files, read=unreadable)
    expected = "b.yaml:2:9: the policy name 'same' is already taken at a.yaml:1:9"
    assert str(caught.value) == expected


def test_mistakes_of_all_files_are_reported_at_once() -> None:
    files = [("b.yaml", "policy: b"), ("a.yaml", "polcy: a" + END)]
    with pytest.raises(PolicyError) as caught:
        load_policies(files, read=unreadable)
    assert str(caught.value).splitlines() == [
        "a.yaml:1:1: missing key 'policy'",
        "a.yaml:1:1: unknown key 'polcy'; did you mean 'policy'?",
        "b.yaml:1:1: missing key 'confidence'",
    ]


def test_documents_are_bounded() -> None:
    assert problems("#" * (MAX_BYTES + 1)) == [f"p.yaml:1:1: larger than {MAX_BYTES} bytes"]
    (deep,) = problems("a: " + "[" * 100_000)
    assert deep.startswith("p.yaml:1:43: maximum depth")
    levels = [f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]" for n in range(1, 12)]
    (bomb,) = problems("b0: &b0 lol\n" + "\n".join(levels))
    assert bomb.endswith("the document is too large once its aliases are written out")
    (loop,) = problems("a: &a [*a]")
    assert loop.endswith("the document is too large once its aliases are written out")


def test_aliases_stand_for_what_they_name() -> None:
    text = P + "match: {any: [&a {task: x}, {model: y}]}\nrisk: {base: low}\naudit: {rate: 0}\n"
    assert load(text.replace("{model: y}", "*a")).match.any == (load(text).match.any or ())[:1] * 2


def test_values_are_read_as_yaml_1_2_means_them() -> None:
    text = (
        P
        + "match: {task: yes, model: 2024-01-01, key: '5', context: {a: 'on', 1: x}}\nversion: 0x10"
    )
    policy = load(text)
    assert (policy.match.task, policy.match.model, policy.match.key) == ("yes", "2024-01-01", "5")
    assert policy.match.context == {"a": "on", "1": "x"}
    assert policy.version == 16


SCHEMA = """policy: p
stages:
  - name: a
    checks: [{id: x, use: json_schema, schema: schemas/a.json, on_fail: flag}]
confidence: {when_uncalibrated: flag}
"""


def test_file_that_cannot_be_read_is_a_mistake_where_it_is_named() -> None:
    refused(
        SCHEMA.replace("schemas/a", "§schemas/a"),
        "schema file 'schemas/a.json' cannot be read: No such file or directory",
    )


def test_digest_depends_on_meaning_and_on_files_but_not_on_spelling() -> None:
    def with_schema(schema: str, text: str = SCHEMA) -> str:
        return load(text, read={"schemas/a.json": schema}.__getitem__).digest

    first = with_schema('{"type": "object"}')
    assert re.fullmatch(r"[0-9a-f]{64}", first)
    assert with_schema('{"type": "array"}') != first
    assert with_schema('{"type": "object"}', "# a comment\n" + SCHEMA) == first
    assert with_schema('{"type": "object"}', SCHEMA.replace("{id: x,", "{ 'id':  \"x\",")) == first
    assert with_schema('{"type": "object"}', SCHEMA + "version: 1\n") == first
    assert with_schema('{"type": "object"}', SCHEMA + "version: 2\n") != first


def test_label_is_the_name_and_the_start_of_the_digest() -> None:
    policy = load(P)
    assert policy.label == f"p@{policy.digest[:12]}"


def starters() -> PolicySet:
    files = [(path.name, path.read_text()) for path in STARTERS]
    return load_policies(files, read=lambda path: (CONFIG / path).read_text())


def test_starter_policies_load_without_a_warning() -> None:
    assert starters().warnings == ()


@pytest.mark.parametrize(
    ("facts", "name", "stream"),
    [
        (Facts(task="refund_decision"), "refunds", StreamMode.BUFFER),
        (Facts(tools=frozenset({"issue_refund"})), "refunds", StreamMode.BUFFER),
        (Facts(task="support_answer"), "support", StreamMode.BUFFER),
        (Facts(task="ticket_tag"), "tagging", StreamMode.OBSERVE),
        (Facts(), "default", StreamMode.OBSERVE),
    ],
)
def test_starter_policies_cover_every_request(facts: Facts, name: str, stream: StreamMode) -> None:
    found = starters().select(facts)
    assert found is not None
    assert found.policy.policy == name
    assert effective_stream(found.policy) is stream


@pytest.mark.parametrize(
    ("amount", "context", "tier"),
    [
        ("40.0", {}, RiskTier.HIGH),
        ("25000", {}, RiskTier.CRITICAL),
        ("2000", {"is_new_user": "false"}, RiskTier.HIGH),
        ("2000", {"is_new_user": "true"}, RiskTier.CRITICAL),
        ('"a lot"', {}, RiskTier.CRITICAL),
    ],
)
def test_starter_refunds_are_critical_by_amount_and_customer(
    amount: str, context: dict[str, str], tier: RiskTier
) -> None:
    found = starters().select(Facts(task="refund_decision"))
    assert found is not None
    call = ToolCall("issue_refund", Passage("arguments", f'{{"amount": {amount}}}'))
    exchange = Exchange("chat", {}, (Choice("choices[0]", tool_calls=(call,)),), context=context)
    assert assess(found.policy, Variables(exchange, results={})).tier is tier


@pytest.mark.parametrize("path", STARTERS, ids=lambda path: path.name)
def test_json_schema_accepts_the_starter_policies_and_refuses_a_typo(path: Path) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    jsonschema.Draft202012Validator.check_schema(json_schema())
    document = YAML(typ="safe", pure=True).load(path.read_text())
    assert list(validator.iter_errors(document)) == []
    assert list(validator.iter_errors(document | {"stagez": []})) != []


REFERENCE = (Path(__file__).parents[2] / "docs" / "policies.md").read_text()


def test_reference_names_every_key_use_and_variable() -> None:
    definitions = json_schema()["$defs"].values()
    mappings = [json_schema(), *(each for each in definitions if "properties" in each)]
    keys = {key for mapping in mappings for key in mapping["properties"]}
    uses = {each["properties"]["use"]["const"] for each in mappings if "use" in each["properties"]}
    named = set(re.findall(r"[\w.<>]+", REFERENCE))
    named |= {word.rpartition(".")[2] for word in named}
    assert (keys | uses | set(VARIABLES)) - named == set()


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", REFERENCE, re.DOTALL))
def test_example_of_the_reference_loads(example: str) -> None:
    rubric = "{name: r, description: d, criteria: [{id: c, question: 'Is it right?'}]}"
    assert load_policies([("p.yaml", example)], read=lambda path: rubric).warnings == ()


_WORDS = """policy p { } [ ] &a *a !!int !x " ' # 1 1.5 .nan 0x 1e999 confidence hold match any not
when_uncalibrated risk raise when to true null 50s ... é << matrix low = stages checks use forbid
patterns json_schema schema 2024-01-01 ~ \\ud800 \\UFFFFFFFF \\x41 %YAML %TAG 1.99"""
_SPACED = [
    ": ",
    "\n",
    "  ",
    "- ",
    ", ",
    "? ",
    "|\n",
    ">\n",
    "%YAML 1.1\n",
    "---\n",
    "\t",
    "\x85",
    "\r",
]
_PIECES = st.sampled_from([*_WORDS.split(), *_SPACED, "\u2028"])


@settings(max_examples=300, deadline=None)
@given(st.lists(_PIECES, max_size=40).map("".join) | st.text(max_size=60))
def test_any_text_loads_or_is_refused_with_a_place(text: str) -> None:
    found: tuple[Problem, ...] | None = None
    try:
        load(text)
    except PolicyError as error:
        found = error.problems
    assert found is None or found
    assert all(problem.line >= 1 and problem.column >= 1 for problem in found or ())


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just("hold"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text("abc(_", max_size=3) | st.sampled_from(["use", "id"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
_KEYS = st.sampled_from([*sorted(Policy.model_fields), "raise", "as"])


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(_KEYS, _VALUES, max_size=6), st.sampled_from(["secrets", "forbid", "length"])
)
def test_any_values_load_or_are_refused_without_jargon(values: dict[str, object], use: str) -> None:
    stages = [{"name": "a", "checks": [{"id": "x", "use": use, **values}]}]
    out = io.StringIO()
    YAML(typ="safe", pure=True).dump({"stages": stages} | values, out)
    said = ""
    try:
        load(out.getvalue())
    except PolicyError as error:
        said = " ".join(re.sub(r"'.*?'", "", problem.message) for problem in error.problems)
    assert not re.search(r"pydantic|http|Input should|type=|validation error|[Tt]uple|\bdict", said)
