"""How soon a change of the traffic is noticed from unlabelled confidence alone: `python -m benchmarks.drift FOLDER`.

FOLDER holds `stream_*.json` (`name`, `change_at` or null, `items`: pairs of a file and an id) and the JSONL files they name,
whose lines have `id`, `correct` and `features`, numbers by name. In every run the rows before the change are shuffled, and so
are those after it where the change is sudden. The confidence comes from a logistic regression on all features, fitted to the
first 1,000 rows, whose labels are used for nothing else. Prints a table in Markdown.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from policies.drift import REFERENCE, DriftMonitor

RUNS = 40


def rows_of(stream: dict[str, Any], folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of the items of a stream, in order."""
    known: dict[tuple[str, str], dict[str, Any]] = {}
    for name in {file for file, _ in stream["items"]}:
        for line in (folder / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            known[name, row["id"]] = row
    rows = [known[file, each] for file, each in stream["items"]]
    names = sorted(set.intersection(*(set(row["features"]) for row in rows)))
    features = [[float(row["features"][name] or 0.0) for name in names] for row in rows]
    return np.asarray(features), np.asarray([bool(row["correct"]) for row in rows])


def shuffled(n: int, change_at: int | None, draw: random.Random, *, gradual: bool) -> list[int]:
    """An order of the rows that keeps what comes before the change before it."""
    before = list(range(n if change_at is None else change_at))
    after = list(range(len(before), n))
    draw.shuffle(before)
    if not gradual:
        draw.shuffle(after)
    return before + after


def alarm_at(features: np.ndarray, labels: np.ndarray) -> int | None:
    """The request at which there is an alarm, None if there is none."""
    model = make_pipeline(StandardScaler(), LogisticRegression())
    model.fit(features[:REFERENCE], labels[:REFERENCE])
    monitor = DriftMonitor()
    for at, confidence in enumerate(model.predict_proba(features)[:, 1], 1):
        if monitor.add(float(confidence)) is not None:
            return at
    return None


def main(folder: Path) -> None:
    """Print how soon every change is noticed, and how often one that is not there."""
    print("| stream | requests | change at | false alarms | caught | median delay | slowest |")
    print("|---|---|---|---|---|---|---|")
    for path in sorted(folder.glob("stream_*.json")):
        stream = json.loads(path.read_text())
        features, labels = rows_of(stream, folder)
        change_at, early, delays = stream["change_at"], 0, []
        for run in range(RUNS):
            gradual = "gradual" in stream["kind"]
            order = shuffled(len(labels), change_at, random.Random(run), gradual=gradual)
            at = alarm_at(features[order], labels[order])
            if at is not None and at <= (change_at or len(labels)):
                early += 1
            elif at is not None:
                delays.append(at - change_at)
        caught = "" if change_at is None else f"{len(delays)} of {RUNS - early}"
        figures = (f"{median(delays):.0f}", str(max(delays))) if delays else ("", "")
        cells = (
            stream["name"],
            len(labels),
            change_at or "none",
            f"{early} of {RUNS}",
            caught,
            *figures,
        )
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
