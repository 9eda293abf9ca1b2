"""How much is audited, and the switching rules."""

from __future__ import annotations

from itertools import islice, repeat
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from policies import Action, AuditLevel, Mode
from policies.auditing import (
    LOT,
    Switching,
    allowed_errors,
    audit_floor,
    audit_rate,
)
from policies.model import Audit, Cell, Confidence, Policy

NORMAL, TIGHTENED, REDUCED, STOP = AuditLevel
ADAPTIVE = {"rate": 0.15, "adaptive": {"min": 0.05, "max": 0.3}}


def a_policy(audit: dict[str, Any], mode: Mode = Mode.ENFORCE, **more: Any) -> Policy:
    confidence = Confidence(when_uncalibrated="hold")
    return Policy(policy="p", confidence=confidence, audit=Audit(**audit), mode=mode, **more)


@pytest.mark.parametrize(
    ("mode", "level", "rate"),
    [
        (Mode.ENFORCE, TIGHTENED, 0.3),
        (Mode.ENFORCE, NORMAL, 0.15),
        (Mode.ENFORCE, REDUCED, 0.05),
        (Mode.OBSERVE, TIGHTENED, 1.0),
        (Mode.OBSERVE, NORMAL, 0.15),
        (Mode.OBSERVE, STOP, 1.0),
    ],
)
def test_an_adaptive_rate_follows_the_level(mode: Mode, level: AuditLevel, rate: float) -> None:
    policy = a_policy(ADAPTIVE, mode)
    assert audit_rate(policy, level) == rate
    assert audit_rate(policy, level, Cell(action=Action.RETURN, audit=0.2)) == max(rate, 0.2)


@pytest.mark.parametrize("level", AuditLevel)
def test_a_fixed_rate_stays(level: AuditLevel) -> None:
    assert audit_rate(a_policy({"rate": 0.1}), level) == 0.1


def test_the_floor_is_the_least_rate_of_anything_that_is_returned() -> None:
    assert audit_floor(a_policy(ADAPTIVE), NORMAL) == 0.15
    assert audit_floor(a_policy(ADAPTIVE), REDUCED) == 0.05
    assert audit_floor(a_policy({"rate": 0.5}), NORMAL) == 0.15
    assert audit_floor(a_policy({}), NORMAL) == 0.15


@pytest.mark.parametrize("audit", [{"rate": 0.4}, {"rate": 0.01}])
def test_a_rate_outside_its_range_is_refused(audit: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        Audit(**{**ADAPTIVE, **audit})


@given(st.integers(1, 300), st.floats(0.001, 0.5))
def test_a_lot_at_the_target_seldom_fails(n: int, target: float) -> None:
    allowed = allowed_errors(n, target)
    assert binom.sf(allowed, n, target) <= 0.05 + 1e-9
    assert allowed == 0 or binom.sf(allowed - 1, n, target) > 0.05 - 1e-9


def after_lots(state: Switching, *errors: int) -> Switching:
    for wrong in errors:
        for acceptable in [*repeat(False, wrong), *repeat(True, LOT - wrong)]:
            state = state.after(acceptable, 0.02)
    return state


class TestSwitching:
    def test_it_begins_tightened_and_relaxes_after_five_good_lots(self) -> None:
        assert after_lots(Switching(), 0, 0, 0, 0).level is TIGHTENED
        assert after_lots(Switching(), 0, 3, 1, 0, 0).level is NORMAL
        assert after_lots(Switching(), 0, 4, 0, 0, 0).level is TIGHTENED

    def test_two_bad_lots_of_five_tighten(self) -> None:
        normal = Switching(NORMAL)
        assert after_lots(normal, 9, 0, 0, 0).level is NORMAL
        assert after_lots(normal, 9, 0, 0, 9).level is TIGHTENED
        assert after_lots(normal, 9, 0, 0, 0, 0, 9).level is NORMAL

    def test_ten_lots_that_are_better_than_asked_for_reduce_and_one_bad_one_ends_it(self) -> None:
        assert after_lots(Switching(NORMAL), *repeat(0, 9)).level is NORMAL
        reduced = after_lots(Switching(NORMAL), *repeat(0, 10))
        assert reduced.level is REDUCED
        assert after_lots(Switching(NORMAL), *repeat(0, 9), 3, 0).level is NORMAL
        assert after_lots(reduced, *repeat(3, 20)).level is REDUCED
        assert after_lots(reduced, 4).level is NORMAL

    def test_five_bad_lots_while_tightened_stop_everything_until_a_person_acts(self) -> None:
        assert after_lots(Switching(), *repeat(9, 4)).level is TIGHTENED
        stopped = after_lots(Switching(), *repeat(9, 5))
        assert stopped.level is STOP
        assert after_lots(stopped, *repeat(0, 50)).level is STOP
        assert stopped.tightened() is stopped

    def test_an_alarm_tightens_at_once_and_keeps_what_is_known_if_it_was(self) -> None:
        assert Switching(REDUCED).tightened() == Switching(TIGHTENED)
        started = after_lots(Switching(), 9)
        assert started.tightened() is started

    def test_in_good_order_the_rate_falls_and_stays_low_and_after_a_fall_it_rises(self) -> None:
        draw, reviews, cost = np.random.default_rng(1), 0, 0.0
        state = Switching()
        policy = a_policy(ADAPTIVE)
        for wrong in islice(iter(draw.random(40_000) < 0.002), 40_000):
            rate = audit_rate(policy, state.level)
            cost += rate
            if draw.random() < rate:
                state, reviews = state.after(not wrong, 0.02), reviews + 1
        assert state.level is REDUCED
        assert cost / 40_000 < 0.1
        for acceptable in draw.random(250) > 0.2:
            state = state.after(bool(acceptable), 0.02)
        assert state.level is TIGHTENED
