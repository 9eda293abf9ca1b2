"""What a threshold promises and what it keeps, on real answers: `python -m benchmarks.calibration FOLDER`.

The folder holds sets of answers of language models with log-probabilities, the opinions of judges or other signals, and whether they
were right, a JSON object a line. Of each set 1,000 answers, or half where there are fewer than 2,000, are labels to fit; the
rest is what happens after. Prints tables in Markdown. Splits are drawn from fixed seeds, so that the same data give the same tables.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from math import exp, log
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.stats import binom

from policies.calibration import Calibrator
from policies.fitting import Mode, fit
from policies.labelled import Labelled
from policies.measures import Bools, Floats, aurc, auroc, ece
from policies.signals import Signals, feature, signals
from validators import Choice, Exchange, Passage, TokenLogprob, TopLogprob

LABELS, SPLITS = 1_000, 20
ALPHAS, DELTA = (0.02, 0.05, 0.10), 0.05
MODES: tuple[Mode, Mode] = ("certified", "estimated")

#: A target is within reach where the best threshold, chosen on the answers themselves, returns this share of them.
REACHABLE = 0.30

#: Features that are probabilities of the answer are log-probabilities; what another way of asking says is a judge's score.
LOGPROBS = {"option_prob": "mean_logprob", "seq_geo_mean_prob": "mean_logprob"}
JUDGES = {
    "option_prob_rephrased": "rephrased",
    "judge_prob": "judge",
    "self_direct_prob": "again",
    "self_cot_prob": "again",
    "verbal_confidence": "verbal",
    "linguistic_confidence": "hedging",
    "self_consistency": "samples",
    "tlm_trustworthiness": "trust",
    "p_true": "p_true",
}
DIGESTS = dict.fromkeys({*JUDGES.values(), "p_true"}, "0" * 64)


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="sets whose name contains this")
    options = parser.parse_args()
    named = [each for each in sets(options.folder) if options.only in each[0]]
    measured = [measure(*each) for each in track(named, console=Console(stderr=True))]
    print(signals_table(measured))
    for alpha in ALPHAS:
        print()
        print(threshold_table(measured, alpha))
    print()
    print(aims_table(measured))


# -------------------------------------------------------------------------------------------------------- data


def sets(folder: Path) -> Iterator[tuple[str, list[Labelled]]]:
    """Every set with labels, and the parts of those that are made of several tests."""
    for path in sorted(folder.glob("*.jsonl")):
        with path.open() as file:
            said = [json.loads(line) for line in file]
        yield path.stem, [labelled(each) for each in said]
        if path.stem.startswith("mcq_"):
            for group in sorted({each["group"] for each in said}):
                yield f"{path.stem}:{group}", [labelled(e) for e in said if e["group"] == group]


def labelled(said: dict[str, Any]) -> Labelled:
    features = said.get("features", {})
    known = dict(signals_of(said).values) if "tokens" in said else {}
    for name, value in features.items():
        if value is None:
            continue
        if name in LOGPROBS:
            known[LOGPROBS[name]] = log(max(value, 1e-40))
        elif name in JUDGES:
            known[f"judge.{JUDGES[name]}"] = min(max(float(value), 0.0), 1.0)
        elif name == "p_true_logprob":
            known["judge.p_true"] = exp(min(value, 0.0))
        elif name == "cluster_entropy":
            known["mean_entropy"] = value
        elif name == "n_tokens":
            known["n_tokens"] = float(value)
    return Labelled(said["id"], bool(said["correct"]), known, model=said["model"])


def signals_of(said: dict[str, Any]) -> Signals:
    text = Passage("choices[0].message.content", said["response"])
    choice = Choice("choices[0]", (text,), logprobs=list(tokens(said)))
    return signals(Exchange("chat", {}, (choice,)))


def tokens(said: dict[str, Any]) -> Iterator[TokenLogprob]:
    """Tokens as a provider sends them; where the file lists no others, what is left goes to one other.

    A token that the file knows by its number only (`#198`) has no text.
    """
    for each in said["tokens"]:
        tops = [logprob for _, logprob in each.get("top") or ()] or [each["logprob"]]
        if len(tops) < 2:
            tops.append(log(max(1.0 - exp(min(tops[0], 0.0)), 1e-7)))
        text = "" if each["token"].startswith("#") else each["token"]
        yield TokenLogprob(each["logprob"], text, [TopLogprob(top) for top in tops])


# --------------------------------------------------------------------------------------------------------- measuring


@dataclass
class Kept:
    """What a rule did over the splits: the share it returned, and whether errors exceeded the target."""

    coverage: list[float] = field(default_factory=list)
    broken: list[bool] = field(default_factory=list)
    broken_in_all: list[bool] = field(default_factory=list)

    def add(self, returned: Bools, right: Bools, rest: Bools, alpha: float) -> None:
        """`returned` and `right` of all answers of the set, `rest` those that were no labels."""
        self.coverage.append(float(returned[rest].mean()))
        self.broken.append(wrong(returned & rest, right) > alpha)
        self.broken_in_all.append(wrong(returned, right) > alpha)

    def __str__(self) -> str:
        return f"{fmean(self.coverage):.3f} ({fmean(self.broken):.0%}, {fmean(self.broken_in_all):.0%})"


def wrong(returned: Bools, right: Bools) -> float:
    return float((~right[returned]).mean()) if returned.any() else 0.0


@dataclass
class Measured:
    """A set: its size, and over the splits how well confidence orders and is calibrated, and what rules did."""

    name: str
    n: int
    labels: int
    accuracy: float
    auroc: dict[str, list[float]] = field(default_factory=dict)
    aurc: list[float] = field(default_factory=list)
    ece: dict[str, list[float]] = field(default_factory=dict)
    rules: dict[tuple[str, float], Kept] = field(default_factory=dict)
    told: dict[float, list[float]] = field(default_factory=dict)
    remarks: set[str] = field(default_factory=set)

    def rule(self, name: str, alpha: float) -> Kept:
        """What a rule did at a target."""
        return self.rules.setdefault((name, alpha), Kept())

    def oracle(self, alpha: float) -> float:
        """The share that could have been returned."""
        return fmean(self.rules["oracle", alpha].coverage)


def measure(name: str, rows: Sequence[Labelled]) -> Measured:
    right = np.array([row.acceptable for row in rows])
    labels = min(LABELS, len(rows) // 2)
    found = Measured(name, len(rows), labels, float(right.mean()))
    for split in range(SPLITS):
        chosen = random.Random(f"{name} {split}").sample(range(len(rows)), labels)
        rest = np.ones(len(rows), dtype=bool)
        rest[chosen] = False
        for mode in MODES:
            fitted, diagnostics = fit(
                [rows[i] for i in chosen],
                name="measured",
                created_at=datetime(2026, 1, 1, tzinfo=UTC),
                alpha=ALPHAS[0],
                delta=DELTA,
                mode=mode,
                judges=DIGESTS,
                model="*",
            )
            known = rest & np.array([fitted.lacks(row.signals) is None for row in rows])
            confidence = np.array([confident(fitted, row) for row in rows])
            for offer in diagnostics.offers:
                if offer.alpha in ALPHAS:
                    threshold = 2.0 if offer.threshold is None else offer.threshold
                    found.rule(mode, offer.alpha).add(
                        confidence >= threshold, right, rest, offer.alpha
                    )
            found.auroc.setdefault(mode, []).append(auroc(confidence[known], right[known]))
            found.ece.setdefault(mode, []).append(
                ece(confidence[known], right[known], debiased=True)
            )
            found.remarks |= {each for each in diagnostics.remarks if "constant" in each}
        found.aurc.append(aurc(confidence[known], right[known]))
        found.auroc.setdefault("single", []).append(best_single(rows, rest, right))
        found.ece.setdefault("perfect", []).append(perfect(confidence[known], split))
        for alpha in ALPHAS:
            naive = obvious(confidence[~rest], right[~rest], alpha)
            found.rule("naive", alpha).add(confidence >= naive, right, rest, alpha)
            best = oracle(confidence[rest], right[rest], alpha)
            found.rule("oracle", alpha).add(confidence >= best, right, rest, alpha)
            found.told.setdefault(alpha, []).append(told(confidence, right, labels, alpha))
    return found


def confident(fitted: Calibrator, row: Labelled) -> float:
    """The confidence; 0 where a signal is missing, as such a response is never returned on its own."""
    return fitted.confidence(row.signals) if fitted.lacks(row.signals) is None else 0.0


def best_single(rows: Sequence[Labelled], rest: Bools, right: Bools) -> float:
    """The highest AUROC of a signal alone on the answers that come after: chosen afterwards."""
    found = []
    for name in {name for row in rows for name in row.signals}:
        some = np.array([r and name in row.signals for r, row in zip(rest, rows, strict=True)])
        if some.sum() < 0.9 * rest.sum():
            continue
        values = [feature(name, row.signals[name]) for row, s in zip(rows, some, strict=True) if s]
        area = auroc(values, right[some])
        found.append(max(area, 1 - area))
    return max(found)


def perfect(confidence: Floats, seed: int) -> float:
    """The debiased calibration error of labels that are drawn with the very probabilities that are told."""
    drawn = np.random.default_rng(seed).uniform(size=len(confidence)) < confidence
    return ece(confidence, drawn, debiased=True)


def obvious(confidence: Floats, right: Bools, alpha: float) -> float:
    """What one would write down first: the lowest of .50 to .99 whose errors on the labels are within the target."""
    for percent in range(50, 100):
        if (confidence >= percent / 100).any() and wrong(
            confidence >= percent / 100, right
        ) <= alpha:
            return percent / 100
    return 2.0


def oracle(confidence: Floats, right: Bools, alpha: float) -> float:
    """The lowest threshold that keeps the target on these very answers."""
    values, at = np.unique(-confidence, return_inverse=True)
    errors = np.bincount(at, weights=~right).cumsum() / np.bincount(at).cumsum()
    passed = np.flatnonzero(errors <= alpha)
    return float(-values[passed[-1]]) if len(passed) else 2.0


def told(confidence: Floats, right: Bools, labels: int, alpha: float) -> float:
    """What exact tests would return on average if somebody told them where it is best to begin.

    All labels test, on scores that cost none; thresholds at every 50th of the answers, from the best start on as long as tests pass,
    each at DELTA. Labels are drawn with the errors that the answers have. What is missing to the oracle then is the price of a
    certificate from so many labels, whatever the score and the start are learnt from.
    """
    ranked = right[np.argsort(-confidence, kind="stable")]
    upto = np.linspace(0, len(ranked), 51).astype(int)
    wrong = np.diff(np.append(0, (~ranked).cumsum())[upto]) / np.diff(upto)
    n = (labels * upto[1:] / len(ranked)).astype(int)
    drawn = np.random.default_rng(0).binomial(
        np.diff(n, prepend=0)[:, None], wrong[:, None], (50, 2_000)
    )
    passed = binom.cdf(drawn.cumsum(axis=0), n[:, None], alpha) <= DELTA
    reached, best = np.zeros(2_000), 0.0
    for step in reversed(range(50)):
        reached = np.where(passed[step], np.maximum(reached, (step + 1) / 50), 0.0)
        best = max(best, float(reached.mean()))
    return best


# ----------------------------------------------------------------------------------------------------------- tables


def signals_table(measured: Sequence[Measured]) -> str:
    lines = [
        "| set | answers / labels | right | AUROC best single, afterwards | AUROC certified / estimated | AURC | ECE certified / estimated | "
        "ECE of a perfect one |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in measured:
        areas = {name: fmean(values) for name, values in each.auroc.items()}
        errors = {name: fmean(values) for name, values in each.ece.items()}
        lines.append(
            f"| {each.name} | {each.n} / {each.labels} | {each.accuracy:.3f} | {areas['single']:.3f} "
            f"| {areas['certified']:.3f} / {areas['estimated']:.3f} | {fmean(each.aurc):.3f} "
            f"| {errors['certified']:.3f} / {errors['estimated']:.3f} | {errors['perfect']:.3f} |"
        )
    remarks = [f"- {each.name}: {text}" for each in measured for text in sorted(each.remarks)]
    return "\n".join([*lines, "", *remarks])


def threshold_table(measured: Sequence[Measured], alpha: float) -> str:
    lines = [
        f"| {alpha:.0%} errors | oracle | told | naive | certified | estimated |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for each in measured:
        cells = [str(each.rule(rule, alpha)) for rule in ("naive", *MODES)]
        best = f"{each.oracle(alpha):.3f} | {fmean(each.told[alpha]):.3f}"
        lines.append(f"| {each.name} | {best} | {' | '.join(cells)} |")
    return "\n".join(lines)


def aims_table(measured: Sequence[Measured]) -> str:
    """Over the sets on which the target is within reach; broken over all sets."""
    lines = [
        "| | target | sets within reach | coverage ÷ oracle | broken on them, mean / most | broken on any set, most "
        "| broken in all answers, mean / most |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for rule in ("naive", *MODES):
        for alpha in ALPHAS:
            reached = [each for each in measured if each.oracle(alpha) >= REACHABLE]
            if not reached:
                continue
            kept = [each.rule(rule, alpha) for each in reached]
            share = fmean(
                fmean(one.coverage) / each.oracle(alpha)
                for one, each in zip(kept, reached, strict=True)
            )
            broken = [fmean(one.broken) for one in kept]
            anywhere = max(fmean(each.rule(rule, alpha).broken) for each in measured)
            in_all = [fmean(one.broken_in_all) for one in kept]
            lines.append(
                f"| {rule} | {alpha:.0%} | {len(reached)} | {share:.3f} | {fmean(broken):.1%} / {max(broken):.0%} "
                f"| {anywhere:.0%} | {fmean(in_all):.1%} / {max(in_all):.0%} |"
            )
    for alpha in ALPHAS:
        reached = [each for each in measured if each.oracle(alpha) >= REACHABLE]
        if reached:
            share = fmean(fmean(each.told[alpha]) / each.oracle(alpha) for each in reached)
            lines.append(f"| *told* | {alpha:.0%} | {len(reached)} | {share:.3f} | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
