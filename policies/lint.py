"""What a policy says that cannot be meant: refusals and warnings, each with its path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import pairwise

import msgspec

from judges import Escalating, Judge
from policies.calibration import Calibrator
from policies.match import matches_everything
from policies.model import Band, Condition, Policy, RiskTier, Stage, StreamMode
from policies.source import Path
from policies.streaming import obstacles, reachable_tiers
from validators import OnFail


class Remark(msgspec.Struct, frozen=True):
    """Something about the value at `path`; one that `refuses` keeps the policy from loading."""

    path: Path
    message: str
    refuses: bool = True


def lint(policy: Policy) -> list[Remark]:
    """Everything about a policy that contradicts itself, cannot be done, or has no effect."""
    return [
        *_names(policy),
        *_checks(policy),
        *_risk(policy),
        *_stage_conditions(policy),
        *_judges(policy),
        *_confidence(policy),
        *_stream(policy),
        *_thresholds(policy),
        *_matrix(policy),
        *_hold(policy),
    ]


def unreachable(policies: Sequence[Policy]) -> Iterator[tuple[int, str]]:
    """The indices of the policies no request gets to, each with the reason."""
    catch_all: Policy | None = None
    for index, policy in enumerate(policies):
        if catch_all is not None:
            yield index, f"never used: policy '{catch_all.policy}' before it matches every request"
        elif matches_everything(policy.match):
            catch_all = policy


def staleness(policy: Policy, calibrators: Mapping[str, Calibrator]) -> list[str]:
    """What a policy expects of its artefacts and they cannot give, until they are fitted again.

    That is what was fitted for another version of its checks and judges, so that a response has no
    confidence or a check of it is an error; and with `from_calibrator` a tier that the calibrator has no
    certificate for, so that nothing there is confident. `calibrators` are those there are, by name.
    """
    found = []
    calibrator = calibrators.get(policy.confidence.calibrator or "")
    if calibrator is not None:
        found.append(calibrator.stale(policy.checks_digest, policy.judge_digests))
        found += _uncertified(policy, calibrator)
    found += [
        f"the thresholds of check {judge.id} are stale: judge {', '.join(judge.stale)} has changed"
        for judge in policy.judges
        if isinstance(judge, Escalating) and judge.stale
    ]
    return [each for each in found if each is not None]


def _uncertified(policy: Policy, calibrator: Calibrator) -> Iterator[str]:
    if not policy.thresholds.from_calibrator:
        return
    for tier in sorted(reachable_tiers(policy), key=lambda each: each.rank):
        row = policy.matrix.of(tier)
        if row.confident == row.unsure or any(
            each.tier in (None, tier) for each in calibrator.certificates
        ):
            continue
        yield (
            f"thresholds.from_calibrator: calibrator {calibrator.name} has no certificate for tier "
            f"{tier}; fit it with labels of that tier, or write the thresholds"
        )


def _names(policy: Policy) -> Iterator[Remark]:
    stages: set[str] = set()
    checks: set[str] = set()
    for at, stage in enumerate(policy.stages):
        if stage.name in stages:
            yield Remark(("stages", at, "name"), f"a stage '{stage.name}' is already there")
        stages.add(stage.name)
        for index, check in enumerate(stage.checks):
            if check.id in checks:
                path = ("stages", at, "checks", index, "id")
                yield Remark(path, f"a check with the id '{check.id}' is already there")
            checks.add(check.id)


def _checks(policy: Policy) -> Iterator[Remark]:
    for at, stage in enumerate(policy.stages):
        for index, check in enumerate(stage.checks):
            path = ("stages", at, "checks", index, "on_fail")
            if check.on_fail is OnFail.REGENERATE and policy.regenerate.attempts == 0:
                yield Remark(path, "regenerate needs 'regenerate: {attempts: 1}' or more")


def _risk(policy: Policy) -> Iterator[Remark]:
    base = policy.risk.base
    for at, rule in enumerate(policy.risk.raise_):
        if rule.to.rank <= base.rank:
            message = f"never raises anything: the base is already {base}"
            yield Remark(("risk", "raise", at, "to"), message, refuses=False)


def _stage_conditions(policy: Policy) -> Iterator[Remark]:
    known: set[str] = set()
    for at, stage in enumerate(policy.stages):
        if stage.when is not None:
            for check in sorted(policy.expression(stage.when).checks - known):
                message = f"check '{check}' has not run by then; refer to checks of earlier stages"
                yield Remark(("stages", at, "when"), message)
        known |= {check.id for check in stage.checks}


_ENFORCING = {OnFail.BLOCK, OnFail.HOLD, OnFail.REGENERATE}


def _judges(policy: Policy) -> Iterator[Remark]:
    for at, stage in enumerate(policy.stages):
        yield from _asked(policy, at, stage)
        for index, check in enumerate(stage.checks):
            path = ("stages", at, "checks", index)
            if isinstance(check, Judge):
                yield from _is_maker(policy, check, path)
                if stage.sample < 1.0 and check.on_fail in _ENFORCING:
                    message = (
                        f"'on_fail: {check.on_fail}' of '{check.id}' can only apply to the share "
                        f"{stage.sample:g} of the responses; the rest is not judged"
                    )
                    yield Remark(("stages", at, "sample"), message, refuses=False)


def _asked(policy: Policy, at: int, stage: Stage) -> Iterator[Remark]:
    """What is odd about when, and for how much money, the judges of a stage are asked."""
    rules = next((later for later in policy.stages[at + 1 :] if not later.judges), None)
    if stage.judges and rules is not None:
        message = (
            f"asks a model before the rules of stage '{rules.name}', which cost nothing and may "
            "settle the outcome; put the rules first"
        )
        yield Remark(("stages", at, "name"), message, refuses=False)
    if stage.sample == 0.0:
        yield Remark(("stages", at, "sample"), "with 0 the stage never runs", refuses=False)
    if stage.budget is None:
        return
    if not stage.judges:
        message = "has no effect: no check of this stage asks a model"
        yield Remark(("stages", at, "budget"), message, refuses=False)
    elif stage.budget.when_used_up is not None and stage.budget.usd_per_day is None:
        message = "has no effect without 'usd_per_day'"
        yield Remark(("stages", at, "budget", "when_used_up"), message, refuses=False)


def _is_maker(policy: Policy, judge: Judge, path: Path) -> Iterator[Remark]:
    for model in judge.models:
        for made_by in _models(policy.match):
            if made_by.strip("*") and fnmatchcase(model, made_by):
                message = (
                    f"judge '{judge.id}' asks '{model}', which 'match.model: {made_by}' says may "
                    "have written the answer; models are lenient with their own"
                )
                key = "model" if "model" in type(judge).model_fields else "judges"
                yield Remark((*path, key), message, refuses=False)
                return


def _models(condition: Condition) -> Iterator[str]:
    """The patterns of models a condition asks for."""
    if condition.model is not None:
        yield condition.model
    for part in (*(condition.any or ()), *(condition.all or ())):
        yield from _models(part)


def _confidence(policy: Policy) -> Iterator[Remark]:
    if policy.confidence.source == "judge" and not policy.judges:
        message = "no check of this policy asks a model, so there is never a confidence"
        yield Remark(("confidence", "source"), message, refuses=False)
    if policy.confidence.calibrator is not None:
        return
    conditions: list[tuple[Path, str | None]] = [
        *((("stages", at, "when"), stage.when) for at, stage in enumerate(policy.stages)),
        *((("risk", "raise", at, "when"), rule.when) for at, rule in enumerate(policy.risk.raise_)),
    ]
    for path, when in conditions:
        if when is not None and "confidence" in policy.expression(when).names:
            message = "confidence is never known without 'confidence: {calibrator: ...}'"
            yield Remark(path, message, refuses=False)


def _stream(policy: Policy) -> Iterator[Remark]:
    if policy.stream in (StreamMode.AUTO, StreamMode.BUFFER):
        return
    for path, what in obstacles(policy, policy.stream):
        message = f"'stream: {policy.stream}' cannot honour {what}; use 'stream: auto'"
        yield Remark(path, message)


def _thresholds(policy: Policy) -> Iterator[Remark]:
    if policy.thresholds.from_calibrator:
        if policy.confidence.calibrator is None:
            message = "from_calibrator needs a calibrator: write 'confidence: {calibrator: ...}'"
            yield Remark(("thresholds", "from_calibrator"), message)
        return
    for tier in reachable_tiers(policy):
        pair = policy.thresholds.of(tier)
        if pair.confident == 0:
            own = () if pair is policy.thresholds else (tier.value,)
            message = f"with 0 every response of tier {tier} is confident"
            yield Remark(("thresholds", *own, "confident"), message, refuses=False)


def _matrix(policy: Policy) -> Iterator[Remark]:
    for lower, higher in pairwise(RiskTier):
        for band in Band:
            below = policy.matrix.of(lower).of(band).action
            action = policy.matrix.of(higher).of(band).action
            if action.severity < below.severity:
                message = f"'{action}' for {higher} is milder than '{below}' for {lower}"
                yield Remark(("matrix", higher.value, band.value), message, refuses=False)


def _hold(policy: Policy) -> Iterator[Remark]:
    if policy.hold.on_deadline == "release" and RiskTier.CRITICAL in reachable_tiers(policy):
        message = "responses of tier critical are never released; at the deadline they are rejected"
        yield Remark(("hold", "on_deadline"), message, refuses=False)
