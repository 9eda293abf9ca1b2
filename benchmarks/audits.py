"""What audits cost and what they see, by simulation with known truth: `python -m benchmarks.audits`.

First, by how much the standard error of the error escape is less when the same number of audits is spread over the
confidences of a cell as Holdgate does it than when they are drawn uniformly. Second, an adaptive rate against a fixed one: audits needed, and how
many requests it takes to notice that errors have become three times the target. Third, how often audits come to `stop`.
Prints tables in Markdown.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf

import numpy as np

from policies.auditing import AuditLevel, Spread, Switching
from policies.monitoring import ErrorCusum

RATE, ROWS, RUNS = 0.1, 6000, 4000
TARGET, GOOD, BAD, BEFORE, AFTER = 0.02, 0.005, 0.06, 30_000, 30_000
RUN_AUDITS, STOP_RUNS = 5_000, 300
RATES = {AuditLevel.TIGHTENED: 0.30, AuditLevel.NORMAL: 0.15, AuditLevel.REDUCED: 0.05}


def spread(confidence: np.ndarray) -> np.ndarray:
    """The inclusion probabilities that Holdgate gives these responses of one cell, after 1,000 labels of the same kind."""
    labelled = confidence[:1000]
    at = np.unique(np.quantile(labelled, np.linspace(0, 1, 50), method="nearest"))
    known = Spread((float(each), float((labelled >= each).mean())) for each in at)
    low = float(confidence.min())
    found = [known.probability(each, RATE, low, inf) for each in confidence[1000:].tolist()]
    return np.array(found) * RATE / np.mean(found)


def standard_errors(
    rates: np.ndarray, errors: np.ndarray, draw: np.random.Generator
) -> tuple[float, float]:
    """Those of the Horvitz-Thompson estimate and of the ratio that `error_escape` gives, over RUNS samples."""
    totals, ratios = [], []
    for _ in range(RUNS):
        wrong = draw.random(len(errors)) < errors
        worth = (draw.random(len(errors)) < rates) / rates
        totals.append(float((worth * wrong).mean() - wrong.mean()))
        ratios.append(float((worth @ wrong) / worth.sum() - wrong.mean()))
    return float(np.std(totals)), float(np.std(ratios))


def detection(
    rate_of: Callable[[Switching], float], seed: int, *, alarm: int
) -> tuple[float, float]:
    """Audits a request while all is well, and requests until an alarm after errors have become BAD.

    `alarm`: after so many requests drift of the confidence tightens audits; 0 for never.
    """
    draw, state, cusum = np.random.default_rng(seed), Switching(), ErrorCusum(TARGET)
    audits = 0
    chances = draw.random((BEFORE + AFTER, 2))
    for at, (drawn, wrong) in enumerate(chances):
        if alarm and at == BEFORE + alarm:
            state = state.tightened()
        if drawn >= rate_of(state):
            continue
        acceptable = wrong >= (GOOD if at < BEFORE else BAD)
        state, cusum = state.after(bool(acceptable), TARGET), cusum.after(bool(acceptable))
        if at < BEFORE:
            audits += 1
        elif cusum.is_alarm:
            return audits / BEFORE, at - BEFORE
    return audits / BEFORE, AFTER


def stopped(target: float, errors: float, seed: int) -> bool:
    """Whether RUN_AUDITS audits, of which so large a share are errors, come to `stop`."""
    draw, state = np.random.default_rng(seed), Switching()
    for wrong in (draw.random(RUN_AUDITS) < errors).tolist():
        state = state.after(not wrong, target)
    return state.level is AuditLevel.STOP


def main() -> None:
    """Print the tables."""
    draw = np.random.default_rng(1)
    shapes = {
        "beta(8, 1)": draw.beta(8, 1, ROWS),
        "beta(20, 1)": draw.beta(20, 1, ROWS),
        "log-odds normal(3, 2)": 1 / (1 + np.exp(-draw.normal(3, 2, ROWS))),
        "log-odds normal(5, 2)": 1 / (1 + np.exp(-draw.normal(5, 2, ROWS))),
        "seven tenths claim 0.5 % errors, the rest 20 %": np.where(
            draw.random(ROWS) < 0.7, 0.995, 0.8
        ),
    }
    print("| confidence | returned from | errors | less by | as a ratio |\n|---|--:|--:|--:|--:|")
    for name, every in shapes.items():
        for low in (0.0, 0.9, 0.95):
            confidence = every[every >= low]
            errors = 1 - confidence[1000:]
            uniform = standard_errors(np.full(len(errors), RATE), errors, draw)
            other = standard_errors(spread(confidence), errors, draw)
            less = [f"{1 - mine / theirs:.0%}" for mine, theirs in zip(other, uniform, strict=True)]
            print(f"| {name} | {low:g} | {errors.mean():.1%} | {' | '.join(less)} |")
    print(
        "\n| audits | share audited while all is well | requests to the alarm, median |\n|---|---|---|"
    )
    for name, rate_of, alarm in (
        ("fixed 20 %", lambda _: 0.2, 0),
        ("adaptive", lambda state: RATES.get(state.level, 1.0), 0),
        (
            "adaptive, tightened by a drift after 100 requests",
            lambda state: RATES.get(state.level, 1.0),
            100,
        ),
    ):
        found = [detection(rate_of, seed, alarm=alarm) for seed in range(20)]
        share = np.mean([each for each, _ in found])
        print(f"| {name} | {share:.3f} | {np.median([each for _, each in found]):.0f} |")
    print(f"\n| target | errors ÷ target | stopped in {RUN_AUDITS} audits |\n|--:|--:|--:|")
    for target in (0.02, 0.05, 0.1):
        for times in (1.0, 1.5, 2.0):
            found_at = [stopped(target, target * times, seed) for seed in range(STOP_RUNS)]
            print(f"| {target:.0%} | {times:g} | {np.mean(found_at):.0%} |")


if __name__ == "__main__":
    main()
