"""What signals cost, and what is known of the fields of an answer: `python -m benchmarks.signals [extract_selfmade.jsonl]`.

The costs are of 300 tokens, the least of many rounds; prose and JSON take turns, so that neighbours disturb them alike. Of the file,
whose answers have six fields with labels of their own, it is told how well the probability of a field's tokens tells right from wrong
ones, and how often the least likely field is a wrong one. Prints tables in Markdown.
"""

from __future__ import annotations

import argparse
import json
import random
import timeit
from collections.abc import Callable
from math import log
from pathlib import Path
from statistics import fmean

import numpy as np

from policies.measures import auroc
from policies.signals import FieldSignal, field_signals, signals, token_signals
from validators import Choice, Exchange, Passage, TokenLogprob, TopLogprob

TOKENS, TOP, ROUNDS, CALLS = 300, 5, 200, 10

PATH = "choices[0].message.content"
ITEM = ('{"', "sku", '":"', "GA", "67", "7", '","', "qty", '":', "4", ',"', "price", '":', "5", ".", "50", "},")  # fmt: skip
WORDS = (" the", " order", " was", " sent", ".", " on", " 12", " May")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?")
    options = parser.parse_args()
    print(costs_table())
    if options.file is not None:
        print()
        print(fields_table(options.file))


# --------------------------------------------------------------------------------------------------------------- costs


def costs_table() -> str:
    calls: dict[tuple[str, str], Callable[[], object]] = {}
    for kind in ("prose", "JSON"):
        for top in (TOP, 0):
            written = tokens(kind, top)
            column = f"{kind}, {top} alternatives"
            calls["of all tokens", column] = lambda t=written: token_signals(t)
            calls["with those of the answer", column] = lambda t=written: signals(said(t))
            calls["the fields, of what is reviewed", column] = lambda t=written: field_signals(
                said(t)
            )
    best = dict.fromkeys(calls, 1e9)
    for _ in range(ROUNDS):
        for each, call in calls.items():
            best[each] = min(best[each], timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    columns = list(dict.fromkeys(column for _, column in calls))
    lines = [f"| µs | {' | '.join(columns)} |", "|---|" + "--:|" * len(columns)]
    lines += [
        f"| {row} | " + " | ".join(f"{best[row, each]:.0f}" for each in columns) + " |"
        for row in dict.fromkeys(row for row, _ in calls)
    ]
    return "\n".join(lines)


def tokens(kind: str, top: int) -> list[TokenLogprob]:
    """Tokens of an answer, most of them certain."""
    draws = random.Random(1)
    if kind == "prose":
        texts = draws.choices(WORDS, k=TOKENS)
    else:
        texts = ["[", *(ITEM * (TOKENS // len(ITEM)))[:-1], "}", "]"]
    chances = [1.0 - 0.9 * draws.random() ** 9 for _ in texts]
    return [
        TokenLogprob(log(p), text, others(p, top)) for text, p in zip(texts, chances, strict=True)
    ]


def others(p: float, top: int) -> list[TopLogprob] | None:
    if not top:
        return None
    rest = [max((1.0 - p) * 0.6 * 0.4**rank, 1e-9) for rank in range(top - 1)]
    return [TopLogprob(log(each)) for each in sorted((p, *rest), reverse=True)]


def said(written: list[TokenLogprob], text: str | None = None) -> Exchange:
    text = "".join(token.token for token in written) if text is None else text
    return Exchange("chat", {}, (Choice("choices[0]", (Passage(PATH, text),), logprobs=written),))


# -------------------------------------------------------------------------------------------------------------- fields


def fields_table(file: Path) -> str:
    with file.open() as lines:
        answers = [json.loads(line) for line in lines]
    scores: dict[str, list[float]] = {}
    right: dict[str, list[bool]] = {}
    first, second, wrongs, found, there = [], [], 0, 0, 0
    for answer in answers:
        written = [TokenLogprob(each["logprob"], each["token"]) for each in answer["tokens"]]
        told = {name_of(each): each for each in field_signals(said(written, answer["response"]))}
        truth = {name: bool(each["correct"]) for name, each in answer["fields"].items()}
        there += len(truth)
        found += len(told)
        for name, field in told.items():
            scores.setdefault(name, []).append(field.token_probability)
            right.setdefault(name, []).append(truth[name])
        order = list(told)
        if told and not all(truth.values()):
            wrongs += 1
            first.append(not truth[order[0]])
            second.append(not all(truth[name] for name in order[:2]))
    rows = ["| field | wrong | AUROC of its token probability |", "|---|--:|--:|"]
    for name in scores:
        share, area = 1 - fmean(right[name]), auroc(np.array(scores[name]), np.array(right[name]))
        rows.append(f"| `{name}` | {share:.1%} | {area:.3f} |")
    return "\n".join(
        [
            *rows,
            "",
            f"Located: {found:,} of {there:,} fields. Of {wrongs} answers with a wrong field the least likely field is wrong in "
            f"{fmean(first):.1%}, one of the two least likely ones in {fmean(second):.1%}.",
        ]
    )


def name_of(field: FieldSignal) -> str:
    return field.path.partition("#/")[2]


if __name__ == "__main__":
    main()
