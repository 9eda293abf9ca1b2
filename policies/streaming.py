"""What a policy can do to a response, and so how a stream of it must be checked."""

from __future__ import annotations

from collections.abc import Iterator

from policies.decision import default_on_error
from policies.model import Action, AnyCheck, Band, Mode, Policy, RiskTier, StreamMode
from policies.source import Path
from validators import OnError, OnFail
from validators.scan import Scan

_ENFORCING = {OnFail.BLOCK, OnFail.HOLD, OnFail.REDACT, OnFail.REGENERATE}


def effective_stream(policy: Policy) -> StreamMode:
    """How streams are checked under a policy: its own `stream`, or what `auto` comes to; not AUTO.

    `auto` is the fastest mode that can do everything the policy may ask for. Under `mode: observe`
    nothing is ever done to a response, so all but `stream: buffer` come to OBSERVE.
    """
    if policy._stream is None:
        policy._stream = _resolve(policy)
    return policy._stream


def _resolve(policy: Policy) -> StreamMode:
    if policy.mode is Mode.OBSERVE:
        return StreamMode.BUFFER if policy.stream is StreamMode.BUFFER else StreamMode.OBSERVE
    if policy.stream is not StreamMode.AUTO:
        return policy.stream
    for mode in (StreamMode.OBSERVE, StreamMode.WINDOW):
        if next(obstacles(policy, mode), None) is None:
            return mode
    return StreamMode.BUFFER


def obstacles(policy: Policy, mode: StreamMode) -> Iterator[tuple[Path, str]]:
    """What the policy may ask for that streams in that mode cannot do: where it says so, in words.

    BUFFER can do everything. WINDOW can block and redact what a check with matches of bounded
    length finds, in a stage without `when`. OBSERVE can do nothing to a response. Without any
    obstacle the mode honours the policy.
    """
    if mode is StreamMode.BUFFER or policy.mode is Mode.OBSERVE:
        return
    yield from _checks_at_odds(policy, mode)
    if policy.confidence.when_uncalibrated == "hold":
        yield ("confidence", "when_uncalibrated"), "when_uncalibrated: hold"
    # Without a confidence the first cell of the row is the least that happens.
    bands = [Band.CONFIDENT] if policy.confidence.calibrator is None else list(Band)
    for tier in reachable_tiers(policy):
        for band in bands:
            action = policy.matrix.of(tier).of(band).action
            if action in (Action.HOLD, Action.BLOCK):
                yield ("matrix", tier.value, band.value), f"'{action}' for tier {tier}, {band}"


def reachable_tiers(policy: Policy) -> tuple[RiskTier, ...]:
    """The tiers an exchange can have under a policy, lowest first."""
    base = policy.risk.base
    raised = {rule.to for rule in policy.risk.raise_ if rule.to.rank > base.rank}
    return tuple(sorted({base, *raised}, key=lambda tier: tier.rank))


def is_bounded(check: AnyCheck) -> bool:
    """Whether what the check finds has a bounded length and is found in that stretch of text."""
    return isinstance(check, Scan) and check.longest_match is not None


def _checks_at_odds(policy: Policy, mode: StreamMode) -> Iterator[tuple[Path, str]]:
    default = default_on_error(reachable_tiers(policy)[-1])
    for at, stage in enumerate(policy.stages):
        used_up = stage.budget and stage.budget.when_used_up
        if stage.judges and used_up in (OnError.HOLD, OnError.BLOCK):
            yield ("stages", at, "budget", "when_used_up"), f"'when_used_up: {used_up}'"
        for index, check in enumerate(stage.checks):
            path = ("stages", at, "checks", index)
            windowed = mode is StreamMode.WINDOW and stage.when is None and is_bounded(check)
            honoured = {OnFail.BLOCK, OnFail.REDACT} if windowed else set()
            if check.on_fail in _ENFORCING - honoured:
                yield (*path, "on_fail"), f"'on_fail: {check.on_fail}' of check '{check.id}'"
            on_error = check.on_error or default
            if on_error is OnError.HOLD or (on_error is OnError.BLOCK and not windowed):
                yield (*path, "on_error"), f"'on_error: {on_error}' of check '{check.id}'"
