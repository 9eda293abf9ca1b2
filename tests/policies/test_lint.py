"""What is odd about the judges of a policy, what is stale, and how mistakes in them are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from judges import Judge
from policies.calibration import Calibrator, Certificate, LogisticScore, Platt
from policies.evidence import Evidence, estimate
from policies.lint import staleness
from policies.loading import json_schema, load_policies, load_policy
from policies.model import Policy, RiskTier, StreamMode
from policies.source import PolicyError
from policies.streaming import effective_stream
from tests.policies.test_loading import places
from validators import Validator

RUBRIC = """\
name: correctness
description: Whether the answer is right.
criteria:
  - {id: correct, question: "Is the answer right?", veto: true}
"""
CONFIDENCE = "confidence: {when_uncalibrated: flag}\n"
JUDGE = "rubric: rubrics/correct.yaml, model: judge-small"


class Files:
    """What a policy may read, and what it has read."""

    def __init__(self, **changed: str) -> None:
        self.files = {"rubrics/correct.yaml": RUBRIC} | changed
        self.read: list[str] = []

    def __call__(self, path: str) -> str:
        self.read.append(path)
        if path not in self.files:
            raise FileNotFoundError(2, "No such file or directory", path)
        return self.files[path]


def document(checks: str, *, stage: str = "", rest: str = "", confidence: str = CONFIDENCE) -> str:
    """A policy with one stage; `checks` are flow mappings, one a line."""
    lines = "".join(f"      - {line}\n" for line in checks.splitlines())
    keys = f"    {stage}\n" if stage else ""
    return f"policy: p\n{rest}stages:\n  - name: judge\n{keys}    checks:\n{lines}{confidence}"


def judged(settings: str = "", **more: str) -> str:
    """A policy with one judge."""
    return document(f"{{id: q, use: rubric, {JUDGE}{settings}}}", **more)


def load(text: str, files: Files | None = None) -> Policy:
    return load_policy(text, file="p.yaml", read=files or Files())


def warnings(text: str) -> list[str]:
    return [str(each) for each in load_policies([("p.yaml", text)], read=Files()).warnings]


def test_a_stage_knows_its_validators_from_its_judges() -> None:
    checks = f"{{id: a, use: secrets}}\n{{id: q, use: rubric, {JUDGE}}}\n{{id: b, use: pii}}"
    (stage,) = load(document(checks)).stages
    assert [each.id for each in stage.validators] == ["a", "b"]
    assert [each.id for each in stage.judges] == ["q"]
    assert all(isinstance(each, Validator) for each in stage.validators)
    assert all(isinstance(each, Judge) for each in stage.judges)


def test_sample_and_budget_are_read_in_their_units() -> None:
    text = judged(
        stage="sample: 0.5\n    budget: {usd_per_day: 20, latency: 4s, when_used_up: hold}"
    )
    (stage,) = load(text).stages
    assert stage.budget is not None
    assert (stage.sample, stage.budget.usd_per_day, stage.budget.latency) == (0.5, 20.0, 4.0)
    assert stage.budget.when_used_up == "hold"
    (plain,) = load(judged()).stages
    assert (plain.sample, plain.budget) == (1.0, None)


def panel(second: str, first: str = f"{{id: a, use: rubric, {JUDGE}}}") -> str:
    members = f"          - {first}\n          - {second}\n"
    return document("id: jury").replace(
        "id: jury\n", f"id: jury\n        use: panel\n        judges:\n{members}"
    )


MISTAKES = {
    "misspelt key": (judged(", §methd: votes"), "unknown key 'methd'; did you mean 'method'?"),
    "misspelt word": (
        judged(", method: §logprobs"),
        "'logprobs' is not one of the words allowed; did you mean 'logprob'?",
    ),
    "misspelt kind": (
        document("{id: q, use: §rubrik}"),
        "unknown check 'rubrik'; did you mean 'rubric'?",
    ),
    "redaction by a judge": (
        judged(", on_fail: §redact"),
        "this check has no spans to redact; write on_fail: hold, flag or block",
    ),
    "misspelt key of a member": (
        panel(f"{{id: b, use: rubric, {JUDGE}, §methd: votes}}"),
        "unknown key 'methd'; did you mean 'method'?",
    ),
    "misspelt kind of a member": (
        panel("{id: b, use: §rubrik}"),
        "unknown check 'rubrik'; did you mean 'rubric'?",
    ),
    "no such rubric file": (
        document("{id: q, use: rubric, rubric: §rubrics/none.yaml, model: judge-small}"),
        "rubric file 'rubrics/none.yaml' cannot be read: No such file or directory",
    ),
    "no such rubric file for a member": (
        panel("{id: b, use: rubric, rubric: §rubrics/none.yaml, model: judge-small}"),
        "rubric file 'rubrics/none.yaml' cannot be read: No such file or directory",
    ),
    "no such thresholds": (
        document(
            "{id: q, use: escalating, thresholds: §calibrators/none.json, judges: ["
            f"{{id: a, use: rubric, {JUDGE}}}, {{id: b, use: rubric, {JUDGE}}}]}}"
        ),
        "thresholds file 'calibrators/none.json' cannot be read: No such file or directory",
    ),
    "sample beyond all": (judged(stage="sample: §1.5"), "must be at most 1.0, not 1.5"),
    "budget of nothing": (
        judged(stage="budget: {usd_per_day: §0}"),
        "must be more than 0.0, not 0",
    ),
    "budget without end": (
        judged(stage="budget: {usd_per_day: §.inf}"),
        "must be a finite number, not inf",
    ),
    "latency without a unit": (
        judged(stage="budget: {latency: §4}"),
        "4 has no unit; write 4s, 4m or 4h",
    ),
    "misspelt key of the budget": (
        judged(stage="budget: {§usd_per_dya: 4}"),
        "unknown key 'usd_per_dya'; did you mean 'usd_per_day'?",
    ),
    "unknown pattern key in a list": (
        document("{id: x, use: forbid, patterns: [{pattern: a, §nmae: b}]}"),
        "unknown key 'nmae'; did you mean 'name'?",
    ),
}


@pytest.mark.parametrize(("marked", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_in_a_judge_is_reported_where_it_is(marked: str, message: str) -> None:
    text, (place,) = places(marked)
    with pytest.raises(PolicyError) as caught:
        load(text)
    assert f"{place} {message}" in str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("rubric", "message"),
    [
        (RUBRIC.replace("veto", "vet"), "criteria.0.vet"),
        ("criteria: [", "is not YAML"),
    ],
    ids=["misspelt key", "no YAML"],
)
def test_a_mistake_in_a_rubric_file_names_file_and_key(rubric: str, message: str) -> None:
    marked = panel("{id: b, use: rubric, rubric: §rubrics/other.yaml, model: judge-small}")
    text, (place,) = places(marked)
    with pytest.raises(PolicyError) as caught:
        load(text, Files(**{"rubrics/other.yaml": rubric}))
    (problem,) = str(caught.value).splitlines()
    assert problem.startswith(f"{place} rubric file 'rubrics/other.yaml' ")
    assert message in problem


@pytest.mark.parametrize("text", [judged(), panel(f"{{id: b, use: rubric, {JUDGE}}}")])
def test_the_digest_covers_the_rubrics_that_judges_name(text: str) -> None:
    files = Files()
    before = load(text, files)
    assert set(files.read) == {"rubrics/correct.yaml"}
    changed = Files(**{"rubrics/correct.yaml": RUBRIC.replace("right?", "true?")})
    after = load(text, changed)
    assert before.digest != after.digest
    assert before.judge_digests != after.judge_digests
    assert load(text + "# a comment\n").digest == before.digest


OPEN = '{any: [{model: "gpt-*"}, {all: [{model: judge-small}]}]}'
WARNINGS = {
    "a model that judges itself": (
        document(
            "{id: q, use: rubric, rubric: rubrics/correct.yaml, model: §gpt-4o}",
            rest=f"match: {OPEN}\n",
        ),
        "judge 'q' asks 'gpt-4o', which 'match.model: gpt-*' says may have written the answer; "
        "models are lenient with their own",
    ),
    "the same literal": (
        document(
            "{id: q, use: rubric, rubric: rubrics/correct.yaml, model: §judge-small}",
            rest=f"match: {OPEN}\n",
        ),
        "judge 'q' asks 'judge-small', which 'match.model: judge-small' says may have written the "
        "answer; models are lenient with their own",
    ),
    "sampled enforcement": (
        judged(", on_fail: block", stage="sample: §0.25"),
        "'on_fail: block' of 'q' can only apply to the share 0.25 of the responses; the rest is "
        "not judged",
    ),
    "never sampled": (judged(", on_fail: flag", stage="sample: §0"), "with 0 the stage never runs"),
    "judges before rules": (
        judged()
        .replace("name: judge", "name: §judge")
        .replace(CONFIDENCE, "  - {name: rules, checks: [{id: a, use: secrets}]}\n" + CONFIDENCE),
        "asks a model before the rules of stage 'rules', which cost nothing and may settle the "
        "outcome; put the rules first",
    ),
    "budget of rules": (
        document("{id: a, use: secrets}", stage="budget: §{usd_per_day: 1}"),
        "has no effect: no check of this stage asks a model",
    ),
    "end of no budget": (
        judged(stage="budget: {latency: 1s, when_used_up: §hold}"),
        "has no effect without 'usd_per_day'",
    ),
    "confidence of no judge": (
        document(
            "{id: a, use: secrets}",
            confidence="confidence: {source: §judge, when_uncalibrated: flag}\n",
        ),
        "no check of this policy asks a model, so there is never a confidence",
    ),
}


@pytest.mark.parametrize(("marked", "message"), WARNINGS.values(), ids=WARNINGS.keys())
def test_what_can_hardly_be_meant_of_judges_is_warned_of(marked: str, message: str) -> None:
    text, (place,) = places(marked)
    assert warnings(text) == [f"{place} {message}"]


@pytest.mark.parametrize(
    "text",
    [
        judged(),
        judged(rest='match: {model: "gpt-*"}\n'),
        judged(rest='match: {not: {model: "judge-*"}}\n'),
        judged(rest='match: {model: "*"}\n'),
        judged(", on_fail: flag", stage="sample: 0.5"),
        judged(", on_fail: score", stage="sample: 0.5"),
        judged(stage="budget: {usd_per_day: 5, when_used_up: hold}"),
        judged(confidence="confidence: {source: judge, when_uncalibrated: flag}\n"),
    ],
)
def test_what_may_be_meant_of_judges_is_not_warned_of(text: str) -> None:
    assert warnings(text) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (judged(), StreamMode.BUFFER),
        (judged(", on_fail: block"), StreamMode.BUFFER),
        (judged(", on_fail: flag, on_error: hold"), StreamMode.BUFFER),
        (judged(", on_fail: flag", rest="risk: {base: high}\n"), StreamMode.BUFFER),
        (judged(", on_fail: flag", rest="risk: {base: critical}\n"), StreamMode.BUFFER),
        (
            judged(", on_fail: flag", stage="budget: {usd_per_day: 1, when_used_up: hold}"),
            StreamMode.BUFFER,
        ),
        (
            judged(
                ", on_fail: score",
                confidence="confidence: {source: judge, calibrator: c, when_uncalibrated: flag}\n",
            ),
            StreamMode.BUFFER,
        ),
        (
            judged(", on_fail: flag", stage="budget: {usd_per_day: 1, when_used_up: flag}"),
            StreamMode.OBSERVE,
        ),
        (judged(", on_fail: flag, on_error: return"), StreamMode.OBSERVE),
        (judged(rest="mode: observe\n"), StreamMode.OBSERVE),
    ],
)
def test_streams_wait_for_judges_that_can_stop_them(text: str, expected: StreamMode) -> None:
    assert effective_stream(load(text)) is expected


@pytest.mark.parametrize("mode", ["window", "observe"])
@pytest.mark.parametrize(
    ("settings", "stage", "what"),
    [
        (", on_fail: §hold, on_error: flag", "", "'on_fail: hold' of check 'q'"),
        (", on_fail: flag, on_error: §block", "", "'on_error: block' of check 'q'"),
        (
            ", on_fail: flag, on_error: flag",
            "budget: {usd_per_day: 1, when_used_up: §block}",
            "'when_used_up: block'",
        ),
    ],
)
def test_a_stream_that_does_not_wait_refuses_judges_that_could_stop_it(
    mode: str, settings: str, stage: str, what: str
) -> None:
    text, (place,) = places(judged(settings, stage=stage, rest=f"stream: {mode}\n"))
    with pytest.raises(PolicyError) as caught:
        load(text)
    expected = f"{place} 'stream: {mode}' cannot honour {what}; use 'stream: auto'"
    assert str(caught.value) == expected


def of_judge(policy: Policy) -> Calibrator:
    """A calibrator fitted for the judge `q` of this policy."""
    return Calibrator.model_validate(
        {
            "format": 1,
            "name": "c",
            "created_at": "2026-01-02T03:04:05Z",
            "source": "judge",
            "model": "*",
            "score": LogisticScore(kind="logistic", intercept=0.0, coefficients={"judge.q": 1.0}),
            "judges": {"q": policy.judge_digests["q"]},
            "n": 10,
            "calibrator": Platt(kind="platt", a=-1.0, b=0.0),
        },
        strict=False,
    )


CALIBRATED = "confidence: {source: judge, calibrator: c, when_uncalibrated: flag}\n"


@pytest.mark.parametrize(
    ("changed", "files"),
    [
        (judged(confidence=CALIBRATED).replace("judge-small", "judge-large"), {}),
        (judged(confidence=CALIBRATED), {"rubrics/correct.yaml": RUBRIC.replace("right?", "so?")}),
    ],
    ids=["model", "rubric"],
)
def test_another_model_or_rubric_makes_a_calibrator_stale(
    changed: str, files: dict[str, str]
) -> None:
    before, after = load(judged(confidence=CALIBRATED)), load(changed, Files(**files))
    calibrator = of_judge(before)
    assert staleness(before, {"c": calibrator}) == []
    reason = "calibrator c is stale: the model, rubric or asking of judge q has changed"
    assert staleness(after, {"c": calibrator}) == [reason]
    found = estimate(after, Evidence(), model="m", calibrator=calibrator)
    assert found.uncalibrated == reason


def test_what_is_made_of_the_score_does_not_make_a_calibrator_stale() -> None:
    calibrator = of_judge(load(judged(confidence=CALIBRATED)))
    same = load(judged(", pass_at: 0.9, on_fail: flag", confidence=CALIBRATED))
    assert staleness(same, {"c": calibrator}) == []


def test_a_calibrator_that_is_not_there_is_not_stale() -> None:
    assert staleness(load(judged(confidence=CALIBRATED)), {}) == []
    assert staleness(load(judged()), {"c": of_judge(load(judged()))}) == []


def escalating(digests: list[str]) -> tuple[str, Files]:
    """A policy with an escalating judge, and the thresholds for judges with these digests."""
    ids = ["a", "b"]
    thresholds: dict[str, Any] = {
        "format": 1,
        "name": "t",
        "created_at": "2026-01-02T03:04:05Z",
        "target_agreement": 0.85,
        "delta": 0.1,
        "n": 500,
        "judges": [
            {"id": each, "digest": digest, "pass_at": 0.9, "fail_at": 0.1}
            for each, digest in zip(ids, digests, strict=True)
        ],
    }
    members = ", ".join(f"{{id: {each}, use: rubric, {JUDGE}}}" for each in ids)
    check = f"{{id: q, use: escalating, thresholds: t.json, judges: [{members}]}}"
    return document(check), Files(**{"t.json": json.dumps(thresholds)})


def test_thresholds_of_other_judges_are_stale() -> None:
    digest = load(judged()).judge_digests["q"]
    assert staleness(load(*escalating([digest, digest])), {}) == []
    assert staleness(load(*escalating([digest, "0" * 64])), {}) == [
        "the thresholds of check q are stale: judge b has changed"
    ]


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        (judged(stage="sample: 0.5\n    budget: {usd_per_day: 20, latency: 4s}"), True),
        (panel(f"{{id: b, use: rubric, {JUDGE}}}"), True),
        (document("{id: x, use: forbid, patterns: a, target: text}"), True),
        (document("{id: x, use: forbid, patterns: [a, {pattern: b}], target: [text]}"), True),
        (document("{id: x, use: forbid, patterns: {pattern: b}}"), True),
        (judged(", methd: votes"), False),
        (panel(f"{{id: b, use: rubric, {JUDGE}, methd: votes}}"), False),
        (document("{id: x, use: forbid, patterns: []}"), False),
        (document("{id: x, use: forbid, patterns: a, target: txt}"), False),
    ],
)
def test_editors_are_told_of_judges_and_of_single_values(text: str, is_valid: bool) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    found = YAML(typ="safe", pure=True).load(text)
    assert validator.is_valid(found) is is_valid
    if is_valid:
        load(text)
    else:
        with pytest.raises(PolicyError):
            load(text)


def test_staleness_is_asked_of_every_starter_policy() -> None:
    config = Path(__file__).parents[2] / "config"
    files = [(path.name, path.read_text()) for path in sorted((config / "policies").glob("*.yaml"))]
    loaded = load_policies(files, read=lambda path: (config / path).read_text())
    text = (config / "calibrators" / "demo.json").read_text()
    demo = Calibrator.model_validate_json(text)
    assert [staleness(each, {"demo": demo}) for each in loaded.policies] == [[]] * len(files)


FROM_CALIBRATOR = CALIBRATED + "thresholds: {from_calibrator: true}\n"


def test_thresholds_of_a_calibrator_need_a_calibrator() -> None:
    text = judged(confidence=FROM_CALIBRATOR).replace("calibrator: c, ", "")
    with pytest.raises(PolicyError, match="from_calibrator needs a calibrator"):
        load(text)


@pytest.mark.parametrize(
    ("certified", "missing"),
    [((), ["low"]), ((RiskTier.LOW,), []), ((None,), []), ((RiskTier.HIGH,), ["low"])],
)
def test_a_tier_that_can_occur_needs_a_certificate(
    certified: tuple[RiskTier | None, ...], missing: list[str]
) -> None:
    loaded = load(judged(confidence=FROM_CALIBRATOR + "risk: {base: low}\n"))
    calibrator = of_judge(loaded).model_copy(
        update={
            "certificates": tuple(
                Certificate(
                    tier=tier, mode="certified", alpha=0.02, delta=0.05, threshold=0.9, n=500
                )
                for tier in certified
            )
        }
    )
    assert staleness(loaded, {"c": calibrator}) == [
        f"thresholds.from_calibrator: calibrator c has no certificate for tier {tier}; fit it with "
        "labels of that tier, or write the thresholds"
        for tier in missing
    ]
