"""What audits cost and what they see, by simulation with known truth: `python -m benchmarks.audits`.

First, the standard error of the error escape under the same number of audits, drawn uniformly and in proportion to
sqrt(e (1 - e)) of the error that the confidence claims. Second, an adaptive rate against a fixed one: audits needed, and how
many requests it takes to notice that errors have become three times the target. Prints tables in Markdown.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from policies.auditing import AuditLevel, Switching
from policies.monitoring import ErrorCusum

RATE, FLOOR, ROWS, RUNS = 0.1, 0.02, 4000, 1000
TARGET, GOOD, BAD, BEFORE, AFTER = 0.02, 0.005, 0.06, 30_000, 30_000
RATES = {AuditLevel.TIGHTENED: 0.30, AuditLevel.NORMAL: 0.15, AuditLevel.REDUCED: 0.05}


def spread(errors: np.ndarray) -> np.ndarray:
    """Inclusion probabilities proportional to sqrt(e (1 - e)), at least FLOOR, with the mean RATE."""
    weights = np.sqrt(errors * (1 - errors))
    low, high = 0.0, 1 / max(float(weights.max()) * 1e-3, 1e-9)
    for _ in range(80):
        scale = (low + high) / 2
        mean = np.clip(scale * weights, FLOOR, 1).mean()
        low, high = (scale, high) if mean < RATE else (low, scale)
    return np.clip(high * weights, FLOOR, 1)


def standard_error(rates: np.ndarray, errors: np.ndarray, draw: np.random.Generator) -> float:
    """That of the Horvitz-Thompson estimate, over RUNS samples of the labels and of who is audited."""
    off = []
    for _ in range(RUNS):
        wrong = draw.random(ROWS) < errors
        seen = draw.random(ROWS) < rates
        off.append(float((seen * wrong / rates).mean() - wrong.mean()))
    return float(np.std(off))


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


def main() -> None:
    """Print both tables."""
    draw = np.random.default_rng(1)
    shapes = {
        "beta(8, 1): 11 % errors": 1 - draw.beta(8, 1, ROWS),
        "beta(20, 1): 5 % errors": 1 - draw.beta(20, 1, ROWS),
        "seven tenths at 0.5 %, the rest at 20 %": np.where(draw.random(ROWS) < 0.7, 0.005, 0.2),
    }
    print("| confidence | uniform | spread | less by |\n|---|---|---|---|")
    for name, errors in shapes.items():
        uniform = standard_error(np.full(ROWS, RATE), errors, draw)
        other = standard_error(spread(errors), errors, draw)
        print(f"| {name} | {uniform:.5f} | {other:.5f} | {1 - other / uniform:.0%} |")
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


if __name__ == "__main__":
    main()
