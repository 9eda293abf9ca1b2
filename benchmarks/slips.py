"""What wrong labels cost a certificate, and what second opinions bring back: `python -m benchmarks.slips`.

Answers whose probability of being acceptable is known, from a score whose log-odds are normal; no answer is surer than 99.8 %.
Of the labels one in a hundred is the wrong way round, whoever gives it. A fifth teaches the order of the tests, the rest
certifies, as `holdgate calibrate fit` does. In the third case other people, who slip as often, look at the suspect labels (a
third person where two differ), and what is then suspect is looked at again, until nothing is. Prints a table in Markdown.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from policies.certification import certify
from policies.maps import cross_fitted, fit_beta
from policies.suspects import SLIPS, doubtful

RUNS, DELTA, BEST = 60, 0.05, 0.998
CASES = (
    ("log-odds normal(4, 2)", 4.0, 2.0, 2000, 0.02),
    ("log-odds normal(4, 2)", 4.0, 2.0, 1000, 0.02),
    ("log-odds normal(3, 2.5)", 3.0, 2.5, 2000, 0.02),
    ("log-odds normal(3, 2.5)", 3.0, 2.5, 1500, 0.05),
)


def answers(
    draw: np.random.Generator, mean: float, spread: float, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores in (0, 1), and the probability with which each answer is acceptable."""
    odds = draw.normal(mean, spread, n)
    return 1 / (1 + np.exp(-odds / 2)), np.minimum(1 / (1 + np.exp(-odds)), BEST)


def looked_at_again(
    scores: np.ndarray, truth: np.ndarray, first: np.ndarray, draw: np.random.Generator
) -> tuple[np.ndarray, int]:
    """The labels once nothing is suspect any more, and how many second and third opinions that took."""
    labels, settled, asked = first.copy(), np.zeros(len(first), dtype=bool), 0
    while True:
        found = doubtful(cross_fitted(scores, labels, fit_beta), labels, settled)
        if not len(found):
            return labels, asked
        second, third = truth[found] ^ (draw.random((2, len(found))) < SLIPS)
        differ = second != first[found]
        labels[found] = np.where(differ, third, second)
        settled[found] = True
        asked += len(found) + int(differ.sum())


def cases(
    mean: float, spread: float, n: int, seed: int
) -> Iterator[tuple[str, np.ndarray, np.ndarray, int]]:
    """Scores and labels without slips, with them, and after second opinions; and how many of these there were."""
    draw = np.random.default_rng(seed)
    scores, chance = answers(draw, mean, spread, n)
    truth = draw.random(n) < chance
    said = truth ^ (draw.random(n) < SLIPS)
    taught = n // 5
    yield "clean", scores, truth, 0
    yield "slips", scores, said, 0
    rest, asked = looked_at_again(scores[taught:], truth[taught:], said[taught:], draw)
    yield "second opinions", scores, np.concatenate([said[:taught], rest]), asked


def main() -> None:
    """Print the table."""
    print("| answers | labels | α | labels are | returned | broken | opinions per 1,000 labels |")
    print("|---|--:|--:|---|--:|--:|--:|")
    for name, mean, spread, n, alpha in CASES:
        scores, chance = answers(np.random.default_rng(99), mean, spread, 200_000)
        order = np.argsort(-scores)
        ranked = scores[order]
        risk = np.cumsum(1 - chance[order]) / np.arange(1, len(order) + 1)
        found: dict[str, list[tuple[float, bool, int]]] = {}
        for seed in range(RUNS):
            for kind, some, labels, asked in cases(mean, spread, n, seed):
                taught = n // 5
                threshold = certify(
                    some[taught:],
                    labels[taught:],
                    some[:taught],
                    labels[:taught],
                    alpha=alpha,
                    delta=DELTA,
                ).threshold
                above = 0 if threshold is None else int((ranked >= threshold).sum())
                broken = above > 0 and bool(risk[above - 1] > alpha)
                found.setdefault(kind, []).append((above / len(ranked), broken, asked))
        for kind, each in found.items():
            returned, broke, asked_of = np.array(each, dtype=float).mean(axis=0)
            row = f"| {name} | {n} | {alpha:.0%} | {kind} | {returned:.0%} | {broke:.0%} | "
            print(row + (f"{1000 * asked_of / (n - n // 5):.0f} |" if asked_of else "|"))


if __name__ == "__main__":
    main()
