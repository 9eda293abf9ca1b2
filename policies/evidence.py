"""What is known of a response: the check results and signals, and the confidence they come to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
from msgspec.structs import replace

from policies.calibration import Calibrator, Certificate
from policies.model import Action, Policy
from policies.signals import JUDGE, FieldSignal, score
from validators import CheckResult


class Reason(msgspec.Struct, frozen=True):
    """What spoke, what it says, and the action it demands (None if it only explains).

    `source` is `check:<id>`, `stage:<name>`, `matrix`, `risk`, `confidence`, `audit`, `regenerate`,
    `mode`.
    """

    source: str
    message: str
    action: Action | None = None


class Evidence(msgspec.Struct, frozen=True):
    """The check results so far, by check id in the order they ran, plus the logprob signals.

    `signals` maps signal name to value (empty when the response carries no usable logprobs;
    `signals_absent` then says why: one of `policies.signals.Absence`). `ran` are the stages run, in
    order; `skipped` those passed over, with the reason; `notes` say of stages that ran why, where
    their condition could not be decided. `fields` are the values of a JSON answer that are least
    likely, for whoever reviews it: nothing is decided by them.
    """

    results: Mapping[str, CheckResult] = msgspec.field(default_factory=dict)
    signals: Mapping[str, float] = msgspec.field(default_factory=dict)
    signals_absent: str | None = None
    ran: tuple[str, ...] = ()
    skipped: tuple[Reason, ...] = ()
    notes: tuple[Reason, ...] = ()
    fields: tuple[FieldSignal, ...] = ()

    def after(self, stage: str, results: Mapping[str, CheckResult]) -> Evidence:
        """Evidence with the results of one more stage."""
        return replace(self, results={**self.results, **results}, ran=(*self.ran, stage))


ConfidenceSource = Literal["logprob", "judge", "consistency", "none"]


class Estimate(msgspec.Struct, frozen=True):
    """How good a response probably is.

    `score` in [0, 1] is uncalibrated and only orders responses; None without signals. `confidence`
    in [0, 1] is the calibrated probability that the response is acceptable; None unless a
    calibrator applies, and then `uncalibrated` says why. `source` is `none` exactly when there is
    no confidence. `calibrator` names the one that gave it, `certificates` are what it has for the task.
    """

    score: float | None = None
    confidence: float | None = None
    source: ConfidenceSource = "none"
    calibrator: str | None = None
    uncalibrated: str | None = None
    certificates: tuple[Certificate, ...] = ()


def estimate(
    policy: Policy,
    evidence: Evidence,
    *,
    model: str,
    calibrator: Calibrator | None,
    suspended: str | None = None,
    task: str | None = None,
) -> Estimate:
    """The score, and the confidence if `calibrator` applies to this evidence on `model`.

    The score is that of the logprobs, or with `source: judge` the least of the judges' scores, all
    of which must be there. Scores of the policy's checks with `on_fail: score` lower it to their
    minimum. If one of them could not tell, neither score nor confidence is known. `suspended` says
    why the calibrator may not be believed at present, None if it may.
    """
    if policy.confidence.source == "none":
        return Estimate(uncalibrated="the policy has no source of confidence")
    results = [evidence.results[each.id] for each in policy.feeding if each.id in evidence.results]
    check_scores = [each.score for each in results if each.score is not None]
    if len(check_scores) < len(results):
        return Estimate(uncalibrated="a check that feeds the score could not tell")
    values = _with_judges(policy, evidence)
    known = _score(policy, values, check_scores)
    if calibrator is None:
        absent = evidence.signals_absent
        why = "there is no calibrator" if absent is None else f"logprobs are {absent}"
        return Estimate(known, uncalibrated=why)
    judges = policy.judge_digests if calibrator.judges else {}
    reason = suspended and f"calibrator {calibrator.name} is suspended: {suspended}"
    if reason := reason or calibrator.fits(model, policy.checks_digest, judges):
        return Estimate(known, uncalibrated=reason)
    if signal := calibrator.lacks(values):
        why = _why_missing(policy, evidence, signal)
        return Estimate(known, uncalibrated=f"calibrator {calibrator.name} does not apply: {why}")
    confidence = calibrator.confidence(values, check_scores)
    return Estimate(
        known,
        confidence,
        calibrator.source,
        calibrator.name,
        certificates=calibrator.certified_for(task),
    )


def _with_judges(policy: Policy, evidence: Evidence) -> Mapping[str, float]:
    """The signals, the scores of the judges among them."""
    if not policy.judges:
        return evidence.signals
    known = {
        JUDGE + judge.id: score
        for judge in policy.judges
        if (result := evidence.results.get(judge.id)) is not None
        and (score := result.score) is not None
    }
    return {**evidence.signals, **known}


def _score(
    policy: Policy, values: Mapping[str, float], check_scores: Sequence[float]
) -> float | None:
    if policy.confidence.source == "logprob":
        return score(values, check_scores)
    given = [values.get(JUDGE + judge.id) for judge in policy.judges]
    known = [each for each in given if each is not None]
    return min([*known, *check_scores]) if known and len(known) == len(given) else None


def _why_missing(policy: Policy, evidence: Evidence, signal: str) -> str:
    """Why the evidence has not the signal a calibrator needs."""
    if not signal.startswith(JUDGE):
        absent = evidence.signals_absent
        return f"needs the signal {signal}" if absent is None else f"logprobs are {absent}"
    judge = signal.removeprefix(JUDGE)
    if judge in evidence.results:
        return f"judge {judge} could not tell"
    (stage,) = (each for each in policy.stages if any(one.id == judge for one in each.judges))
    skipped = [each.message for each in evidence.skipped if each.source == f"stage:{stage.name}"]
    return f"judge {judge} was not asked: " + (skipped[0] if skipped else "its stage has not run")
