"""The risk of an exchange: the task's base, raised by what is in the request and the response."""

from __future__ import annotations

import msgspec
from msgspec.structs import replace

from policies.evidence import Reason
from policies.expressions import MissingValue, Variables
from policies.model import Policy, RiskTier, Stage


class RiskAssessment(msgspec.Struct, frozen=True):
    """The tier, and every rule that raised it; `reasons` starts with the base."""

    tier: RiskTier
    reasons: tuple[Reason, ...]


def assess(policy: Policy, variables: Variables) -> RiskAssessment:
    """The risk of an exchange as far as it is known; never below the policy's base.

    Works before the call (`variables.results` None: rules about the response do not apply yet) and
    after it. A rule that cannot be evaluated raises the tier as if it held, and its reason says so.
    Rules that cannot raise the tier any further are not evaluated. `variables.risk` is not used:
    rules see the tier reached so far.
    """
    tier = policy.risk.base
    reasons = [Reason("risk", f"base tier {tier}")]
    for rule in policy.risk.raise_:
        if rule.to.rank <= tier.rank:
            continue
        try:
            holds = policy.expression(rule.when).holds(replace(variables, risk=tier.rank))
            why = rule.when
        except MissingValue as missing:
            holds, why = True, f"{rule.when} could not be decided: {missing}"
        if holds:
            tier = rule.to
            reasons.append(Reason("risk", f"raised to {tier}: {why}"))
    return RiskAssessment(tier, tuple(reasons))


def stage_applies(policy: Policy, stage: Stage, variables: Variables) -> tuple[bool, Reason | None]:
    """Whether a stage runs, and a reason if it is skipped or if its condition could not be decided.

    A stage without `when` runs. One whose `when` cannot be evaluated runs too.
    """
    if stage.when is None:
        return True, None
    source = f"stage:{stage.name}"
    try:
        if policy.expression(stage.when).holds(variables):
            return True, None
    except MissingValue as missing:
        return True, Reason(source, f"runs because {stage.when} could not be decided: {missing}")
    return False, Reason(source, f"skipped: {stage.when} does not hold")
