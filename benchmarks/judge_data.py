"""What calibrated judges and cascades of judges do on real verdicts: `python -m benchmarks.judge_data FOLDER`.

The folder holds `mmlu_llama31_8b_judged.jsonl`, `mmlu_gemma2_9b_judged.jsonl` (a judge's probability that another model's answer to
an MMLU question is right, the answer's token log-probabilities, and whether it was right) and `judge_pairwise.jsonl` (which of two
answers each of three judges prefers, how surely, and whether people agree). Prints tables in Markdown. Splits are drawn
from fixed seeds, so that the same data give the same tables.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from policies.escalation import Row, Tally, fit_threshold, settle, tally
from policies.maps import best_fit, fit_logistic
from policies.measures import auroc, ece
from policies.signals import token_signals
from validators import TokenLogprob, TopLogprob

#: File, what is judged, and the feature that holds the answer's probability when its own model is asked in another way.
JUDGED = (
    ("mmlu_llama31_8b_judged", "Gemma-2-9B judges Llama-3.1-8B", "self_direct_prob"),
    ("mmlu_gemma2_9b_judged", "Llama-3.1-8B judges Gemma-2-9B", "self_cot_prob"),
)
ANSWER = ("total_logprob", "mean_margin")
JUDGE, AGAIN = "judge.judge", "judge.again"
CASCADE = ("mis7b", "gpt35", "gpt4t")
NAMES = ("Mistral-7B", "GPT-3.5-turbo", "GPT-4-turbo")
LABELS, SPLITS = 1_000, 30
HALVES, TARGET, DELTA = 200, 0.85, 0.1

#: No judge is as sure as this.
NEVER = 2.0


def main() -> None:
    """Print every table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    print(calibration_table(folder))
    print()
    print(cascade_table(*pairwise(folder / "judge_pairwise.jsonl")))


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as file:
        for line in file:
            yield json.loads(line)


# ------------------------------------------------------------------------------------------------- calibration


class Columns(NamedTuple):
    """Judged answers, column by column; `left_out` lack one of the signals."""

    signals: dict[str, list[float]]
    labels: list[bool]
    left_out: int

    def some(self, rows: Sequence[int]) -> tuple[dict[str, list[float]], list[bool]]:
        """The same of some rows."""
        picked = {name: [column[i] for i in rows] for name, column in self.signals.items()}
        return picked, [self.labels[i] for i in rows]


def judged(path: Path, again: str) -> Columns:
    rows = list(rows_of(path))
    told = [row for row in rows if {"judge_prob", again} <= row["features"].keys()]
    signals: dict[str, list[float]] = {name: [] for name in (*ANSWER, JUDGE, AGAIN)}
    for row in told:
        values = token_signals([_token(each) for each in row["tokens"]]).values
        for name in ANSWER:
            signals[name].append(values[name])
        signals[JUDGE].append(row["features"]["judge_prob"])
        signals[AGAIN].append(row["features"][again])
    return Columns(signals, [bool(row["correct"]) for row in told], len(rows) - len(told))


def _token(token: dict[str, Any]) -> TokenLogprob:
    tops = [TopLogprob(logprob) for _, logprob in token.get("top", ())]
    return TokenLogprob(token["logprob"], token["token"], tops or None)


def calibration_table(folder: Path) -> str:
    lines = [
        f"{SPLITS} random splits, {LABELS:,} labels to fit and the rest to measure: mean over the splits and, in brackets, the worst.",
        "",
        "| | rows (left out) | right | judge's ECE raw | calibrated | less its noise | AUROC judge | tokens | both | and asked again |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, title, again in JUDGED:
        data = judged(folder / f"{name}.jsonl", again)
        n, chance = len(data.labels), random.Random(name)
        splits = [_split(data, chance.sample(range(n), n)) for _ in range(SPLITS)]
        errors = [
            f"{fmean(each):.4f} ({max(each):.3f})" for each in list(zip(*splits, strict=True))[:3]
        ]
        orders = [
            f"{fmean(each):.3f} ({min(each):.3f})" for each in list(zip(*splits, strict=True))[3:]
        ]
        figures = [f"{n:,} ({data.left_out})", f"{fmean(data.labels):.3f}", *errors, *orders]
        lines.append(f"| {title} | {' | '.join(figures)} |")
    return "\n".join(lines)


def _split(data: Columns, order: Sequence[int]) -> tuple[float, ...]:
    """ECE of the judge alone: raw, calibrated, calibrated and debiased; AUROC of it, of the answer's tokens, of more together."""
    fit_signals, fit_labels = data.some(order[:LABELS])
    signals, labels = data.some(order[LABELS:])
    calibrator = best_fit(fit_signals[JUDGE], fit_labels)
    calibrated = [calibrator.apply(score) for score in signals[JUDGE]]

    def ordered_by(*names: str) -> float:
        score = fit_logistic({name: fit_signals[name] for name in names}, fit_labels)
        columns = zip(*(signals[name] for name in names), strict=True)
        return auroc([score.of(dict(zip(names, row, strict=True))) for row in columns], labels)

    return (
        ece(signals[JUDGE], labels),
        ece(calibrated, labels),
        ece(calibrated, labels, debiased=True),
        auroc(signals[JUDGE], labels),
        ordered_by(*ANSWER),
        ordered_by(*ANSWER, JUDGE),
        ordered_by(*ANSWER, JUDGE, AGAIN),
    )


# ----------------------------------------------------------------------------------------------------- cascade


def pairwise(path: Path) -> tuple[list[Row], list[bool]]:
    """For each pair the three judges' probabilities that the first answer is better, and whether people think so."""
    by_judge: dict[str, list[dict[str, Any]]] = {name: [] for name in CASCADE}
    for row in rows_of(path):
        by_judge[row["id"].split("-")[1]].append(row)
    rows: list[Row] = []
    labels = []
    for said in zip(*by_judge.values(), strict=True):
        if len({row["prompt"] for row in said}) != 1:
            raise ValueError(f"{path}: {said[0]['id']}: the judges' rows are of different pairs")
        firsts = [row["response"] == "1" for row in said]
        rows.append(
            [
                row["features"]["judge_prob"] if first else 1 - row["features"]["judge_prob"]
                for row, first in zip(said, firsts, strict=True)
            ]
        )
        labels.append(firsts[0] == bool(said[0]["correct"]))
    return rows, labels


Thresholds = Sequence[float]
#: From the fitted half to a threshold for each judge; an oracle looks at the measured half in its place.
Fit = Callable[[Sequence[Row], Sequence[bool]], Thresholds]


def joint(rows: Sequence[Row], labels: Sequence[bool]) -> Thresholds:
    """One sequence of tests for the whole cascade: what `holdgate judge fit` does."""
    found = fit_threshold(rows, labels, target_agreement=TARGET, delta=DELTA)
    return [NEVER if found is None else found] * len(rows[0])


def one_by_one(rows: Sequence[Row], labels: Sequence[bool]) -> Thresholds:
    """A sequence for each judge, on the answers left to it, at a share of delta each."""
    left, thresholds = list(zip(rows, labels, strict=True)), []
    for judge in range(len(rows[0])):
        own = [[row[judge]] for row, _ in left]
        found = fit_threshold(
            own,
            [label for _, label in left],
            target_agreement=TARGET,
            delta=DELTA / len(rows[0]),
        )
        thresholds.append(NEVER if found is None else found)
        left = [
            each for each, row in zip(left, own, strict=True) if settle(row, thresholds[-1]) is None
        ]
    return thresholds


def always(rows: Sequence[Row], labels: Sequence[bool]) -> Thresholds:
    """Believe the first judge whatever it says."""
    return [0.5] * len(rows[0])


def oracle(rows: Sequence[Row], labels: Sequence[bool]) -> Thresholds:
    """The common threshold that decides most and keeps the target on these very answers."""
    candidates = sorted({max(s, 1 - s) for row in rows for s in row if s is not None})
    for threshold in candidates:
        agreement = run([threshold] * len(rows[0]), rows, labels).outcomes.agreement
        if agreement is not None and agreement.value >= TARGET:
            return [threshold] * len(rows[0])
    return [NEVER] * len(rows[0])


def run(thresholds: Thresholds, rows: Sequence[Row], labels: Sequence[bool]) -> Tally:
    """The cascade with a threshold for each judge: what is not sure enough is as good as not said."""
    sure = [
        [
            None if settle([score], threshold) is None else score
            for score, threshold in zip(row, thresholds, strict=True)
        ]
        for row in rows
    ]
    return tally(sure, labels, 0.5)


def risk(found: Tally) -> float:
    """The share of decisions that people do not share; 0 if there are none."""
    agreement = found.outcomes.agreement
    return 0.0 if agreement is None else 1 - agreement.value


def cascade_table(rows: Sequence[Row], labels: Sequence[bool]) -> str:
    noise = sqrt(DELTA * (1 - DELTA) / HALVES)
    only = [[row[-1]] for row in rows]
    lines = [
        f"{len(rows)} pairs, {HALVES} random halves, target {TARGET:.0%}, delta {DELTA}: the target may be broken in {DELTA:.0%} "
        f"of the splits, give or take {noise:.1%} (one standard deviation of {HALVES} draws).",
        "",
        "| | coverage | agreement of the decided | broken in the other half | broken in all pairs | nothing certified "
        f"| asked: {', '.join(NAMES)}, person |",
        "|---|--:|--:|--:|--:|--:|--:|",
        _line("cascade, one joint sequence", rows, labels, joint),
        _line(f"cascade, a sequence per judge at delta / {len(CASCADE)}", rows, labels, one_by_one),
        _line("the largest alone", only, labels, joint),
        _line("the largest alone, always believed", only, labels, always),
        _line("oracle: cascade", rows, labels, oracle, is_oracle=True),
        _line("oracle: the largest alone", only, labels, oracle, is_oracle=True),
    ]
    return "\n".join(lines)


def _line(
    title: str,
    rows: Sequence[Row],
    labels: Sequence[bool],
    fit: Fit,
    *,
    is_oracle: bool = False,
) -> str:
    chance = random.Random(0)
    measured, broken_in_all = [], []
    for _ in range(HALVES):
        order = chance.sample(range(len(rows)), len(rows))
        halves = [
            ([rows[i] for i in part], [labels[i] for i in part])
            for part in (order[: len(rows) // 2], order[len(rows) // 2 :])
        ]
        thresholds = fit(*halves[1 if is_oracle else 0])
        measured.append(run(thresholds, *halves[1]))
        broken_in_all.append(risk(run(thresholds, rows, labels)) > 1 - TARGET)
    width = len(rows[0])
    asked = [fmean(each.asked[judge] / each.n for each in measured) for judge in range(width)]
    shares = [0.0] * (len(CASCADE) - width) + asked
    coverage = fmean(each.coverage for each in measured)
    decided = sum(sum(each.decided) for each in measured)
    wrong = sum(risk(each) * each.outcomes.n for each in measured)
    figures = [
        f"{coverage:.3f}",
        f"{1 - wrong / decided:.3f}",
        f"{fmean(risk(each) > 1 - TARGET for each in measured):.3f}",
        f"{fmean(broken_in_all):.3f}",
        f"{fmean(not sum(each.decided) for each in measured):.3f}",
        " / ".join(f"{share:.2f}" for share in [*shares, 1 - coverage]),
    ]
    return f"| {title} | {' | '.join(figures)} |"


if __name__ == "__main__":
    main()
