"""How much is audited, and the switching rules."""

from __future__ import annotations

from itertools import islice, repeat
from math import inf
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from policies import Action, AuditLevel, Mode
from policies.auditing import (
    LEAST_OF_RATE,
    LOT,
    Spread,
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


def share_failed(wrong: np.ndarray, shares: np.ndarray, target: float) -> float:
    state, lots = Switching(NORMAL), []
    for bad, share in zip(wrong.tolist(), shares.tolist(), strict=True):
        state = state.after(not bad, target, share)
        if state.lots:
            lots.append(state.lots[-1])
            state = Switching(NORMAL)
    return lots.count(False) / len(lots)


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

    @pytest.mark.parametrize("target", [0.02, 0.05, 0.1])
    def test_lots_are_of_what_is_returned_however_the_audits_are_spread(
        self, target: float
    ) -> None:
        draw = np.random.default_rng(5)
        confidence = 1 - target * draw.beta(0.5, 4, 40_000) * 9
        spread = a_spread(confidence[:1000])
        p = np.array([spread.probability(each, 0.3, 0.0, inf) for each in confidence.tolist()])
        error = target / (1 - confidence).mean() * (1 - confidence)
        spread_out, as_if_even = [], []
        for _ in range(5):
            audited = draw.random(40_000) < p
            wrong = (draw.random(40_000) < error)[audited]
            spread_out.append(share_failed(wrong, (p.min() / p)[audited], target))
            as_if_even.append(share_failed(wrong, np.ones(len(wrong)), target))
        assert np.mean(spread_out) < 0.05
        assert np.mean(as_if_even) > 0.08, "more errors are found where more are looked for"

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


def a_spread(confidence: np.ndarray) -> Spread:
    """As of a calibrator fitted to labels with these confidences."""
    at = np.unique(np.quantile(confidence, np.linspace(0, 1, 50), method="nearest"))
    return Spread((float(each), float((confidence >= each).mean())) for each in at)


def log_odds_normal(draw: np.random.Generator, mean: float, n: int) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-draw.normal(mean, 2.0, n))))


def drawn(
    draw: np.random.Generator, confidence: np.ndarray, inclusion: np.ndarray, runs: int
) -> np.ndarray:
    """Horvitz-Thompson estimate less the truth, over samples of what is wrong and of what is audited."""
    off = []
    for _ in range(runs):
        wrong = draw.random(len(confidence)) > confidence
        seen = draw.random(len(confidence)) < inclusion
        off.append(float((seen * wrong / inclusion).mean() - wrong.mean()))
    return np.array(off)


class TestSpread:
    @given(
        st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=50),
        st.floats(0, 1),
        st.floats(0.001, 1),
        st.floats(0, 1),
    )
    def test_no_response_is_left_out_and_none_is_certain_unless_all_are(
        self, curve: list[tuple[float, float]], confidence: float, rate: float, low: float
    ) -> None:
        found = Spread(curve).probability(confidence, rate, low, inf)
        assert LEAST_OF_RATE * rate <= found <= 1
        assert Spread(curve).probability(confidence, 1.0, low, inf) == 1.0
        assert Spread(curve).probability(confidence, 0.0, low, inf) == 0.0
        assert Spread([]).probability(confidence, rate, low, inf) == rate

    def test_the_surer_a_response_claims_to_be_the_less_it_is_audited(self) -> None:
        spread = a_spread(np.random.default_rng(1).beta(8, 1, 1000))
        found = [spread.probability(each, 0.1, 0.6, inf) for each in (0.65, 0.8, 0.9, 0.97, 0.999)]
        assert found == sorted(found, reverse=True)
        assert found[0] > 0.1 > found[-1]

    @pytest.mark.parametrize("rate", [0.05, 0.15, 0.3, 0.9])
    @pytest.mark.parametrize("low", [0.0, 0.9])
    def test_the_mean_of_a_cell_is_its_rate(self, rate: float, low: float) -> None:
        draw = np.random.default_rng(2)
        spread = a_spread(log_odds_normal(draw, 4, 1000))
        fresh = log_odds_normal(draw, 4, 5000)
        found = [spread.probability(each, rate, low, inf) for each in fresh[fresh >= low].tolist()]
        assert np.mean(found) == pytest.approx(rate, rel=0.05)
        assert len(set(found)) <= 8

    @pytest.mark.parametrize(
        ("shape", "less"),
        [
            (lambda draw, n: draw.beta(20, 1, n), 0.10),
            (lambda draw, n: log_odds_normal(draw, 3, n), 0.15),
            (lambda draw, n: np.where(draw.random(n) < 0.7, 0.995, 0.8), 0.25),
        ],
        ids=["beta", "log-odds", "two kinds"],
    )
    def test_the_same_audits_give_a_smaller_standard_error_and_no_bias(
        self, shape: Any, less: float
    ) -> None:
        draw, rate, runs = np.random.default_rng(3), 0.1, 4000
        spread = a_spread(shape(draw, 1000))
        confidence = shape(draw, 2000)
        inclusion = np.array([spread.probability(c, rate, 0, inf) for c in confidence.tolist()])
        inclusion *= rate / inclusion.mean()
        uniform = drawn(draw, confidence, np.full(2000, rate), runs)
        other = drawn(draw, confidence, inclusion, runs)
        assert abs(other.mean()) < 4 * other.std() / np.sqrt(runs)
        # Of 4,000 runs, the standard deviation is known to about 1 %.
        assert other.std() < (1 - less + 0.02) * uniform.std()

    def test_it_stays_unbiased_where_confidence_is_wrong(self) -> None:
        draw = np.random.default_rng(4)
        claimed = log_odds_normal(draw, 4, 2000)
        spread = a_spread(claimed)
        inclusion = np.array([spread.probability(c, 0.1, 0, inf) for c in claimed.tolist()])
        off = drawn(draw, 1 - (1 - claimed) ** 0.3, inclusion, 3000)
        assert abs(off.mean()) < 4 * off.std() / np.sqrt(3000)

    def test_the_floor_of_a_policy_is_that_of_its_least_audited_response(self) -> None:
        assert audit_floor(a_policy(ADAPTIVE), NORMAL, spread=True) == LEAST_OF_RATE * 0.15
        assert audit_floor(a_policy({"rate": 1.0}), NORMAL, spread=True) == LEAST_OF_RATE * 0.15
        assert audit_floor(a_policy(ADAPTIVE, Mode.OBSERVE), STOP, spread=True) == 1.0
