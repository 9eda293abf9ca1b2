"""The report of an evaluation: the same figures as a table on the terminal and as one HTML file that needs nothing else.

What models wrote is hostile: on the terminal none of it is shown, in the file all of it is escaped, none of it is near a
script, and the browser may fetch nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from html import escape

import msgspec
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich.table import Table

from gateway.evaluation.figures import Calibration, Figures, Pair, scored
from gateway.pages import page, table
from policies.agreement import Confusion, Measure
from validators import Outcome

_SHOWN = 25
_EXCERPT_CHARS = 800
_BINS = 10

#: Below so many labels an interval is wide whatever the figure.
SMALL = 100


class Row(msgspec.Struct, frozen=True):
    """A figure, as it is written, and what it says."""

    name: str
    figure: str
    meaning: str


def rows_of(figures: Figures) -> list[Row]:
    """Every figure that could be measured, and the reason for those that could not."""
    return [
        *_counts(figures),
        *_rates(figures.outcomes),
        *_probabilities(figures.calibration),
        *_biases(figures),
        *_costs(figures),
    ]


def _counts(figures: Figures) -> list[Row]:
    errors = ", ".join(f"{count} {cause}" for cause, count in figures.errors.most_common())
    n = figures.outcomes.n
    rows = [
        Row("cases", str(figures.n), f"{n} with a verdict and a label"),
        Row(
            "errors",
            str(figures.errors.total()),
            f"no verdict, in no rate below, never a pass{': ' + errors if errors else ''}",
        ),
    ]
    if n < SMALL:
        rows.append(Row("", "", f"{n} labels are few: read the intervals (95 %), not the figures"))
    return rows


def _rates(outcomes: Confusion) -> list[Row]:
    return [
        Row("agreement", _share(outcomes.agreement), "verdicts that people share"),
        Row("precision", _share(outcomes.precision), "acceptable among those passed"),
        Row("recall", _share(outcomes.recall), "passed among the acceptable"),
        Row(
            "false accepts",
            _share(outcomes.false_accept_rate),
            "passed among the unacceptable",
        ),
        Row("kappa", _number(outcomes.kappa), "agreement beyond chance (Cohen); 1 is perfect"),
    ]


def _probabilities(calibration: Calibration | None) -> list[Row]:
    if calibration is None:
        few = "too few labels of one kind to calibrate on some and measure on others"
        return [Row("calibration error", "–", few)]
    return [
        Row("AUROC", f"{calibration.auroc:.3f}", "how well the score orders; 0.5 is chance"),
        Row(
            "calibration error",
            f"{calibration.ece_raw:.3f} → {calibration.ece:.3f}",
            "of the score as it is → calibrated on other labels (five-fold, 15 bins)",
        ),
        Row(
            "Brier score",
            f"{calibration.brier_raw:.3f} → {calibration.brier:.3f}",
            "mean squared error of the probability; likewise",
        ),
    ]


def _biases(figures: Figures) -> list[Row]:
    rows = []
    if figures.unlabelled:
        why = "" if figures.corrected else "; not possible: the judge is no better than chance here"
        rows.append(
            Row(
                "true pass rate",
                _share(figures.corrected),
                f"of {figures.unlabelled} cases without a label, corrected for the judge's errors{why}",
            )
        )
    rows.append(
        Row(
            "verbosity bias",
            _number(figures.length),
            "rank correlation of score and length at equal label; 0 is none",
        )
    )
    if (position := figures.position) is not None:
        rows += [
            Row("order", _share(position.consistent), "same verdict with both answers exchanged"),
            Row(
                "position bias",
                _share(position.given),
                "of the others, passed in the given order only; 50 % is none",
            ),
        ]
    return rows


def _costs(figures: Figures) -> list[Row]:
    median_ms, p95_ms = figures.latency_ms
    each = "–"
    if figures.cost_usd is not None and figures.n:
        each = f"{figures.cost_usd:.4f} USD, {1000 * figures.cost_usd / figures.n:.3f} USD per 1,000 cases"
    return [
        Row("cost", each, "as the provider counts tokens; – where a price is not known"),
        Row("latency", f"{median_ms:.0f} / {p95_ms:.0f} ms", "median / 95th percentile"),
    ]


def _share(measure: Measure | None) -> str:
    if measure is None:
        return "–"
    return f"{measure.value:.1%} ({measure.low:.1%} to {measure.high:.1%})"


def _number(measure: Measure | None) -> str:
    if measure is None:
        return "–"
    return f"{measure.value:.2f} ({measure.low:.2f} to {measure.high:.2f})"


def group_rows(figures: Figures) -> list[tuple[str, str, str, str]]:
    """Name, number of labels, agreement and false accepts of each group."""
    return [
        (name, str(each.n), _share(each.agreement), _share(each.false_accept_rate))
        for name, each in figures.groups.items()
    ]


def terminal_table(figures: Figures) -> Table:
    """The figures for a terminal."""
    table = Table("figure", "value", "what it says", title=f"judge {figures.judge}")
    for row in rows_of(figures):
        table.add_row(row.name, row.figure, row.meaning)
    return table


def html_report(
    figures: Figures, judged: Sequence[Pair], *, about: Sequence[tuple[str, str]], at: datetime
) -> str:
    """The whole report as one HTML document; `about` says what was measured."""
    labelled = [
        (case, each)
        for case, each in judged
        if case.acceptable is not None and each.outcome is not Outcome.ERROR
    ]
    body = [
        f"<h1>Judge {escape(figures.judge)}</h1>",
        table((), [*about, ("measured", at.isoformat(timespec="seconds"))]),
        "<h2>Figures</h2>",
        table(
            ("figure", "value", "what it says"),
            [(row.name, row.figure, row.meaning) for row in rows_of(figures)],
        ),
        "<p>Intervals hold with 95 % confidence.</p>",
    ]
    if len(figures.groups) > 1:
        names = ("group", "labels", "agreement", "false accepts")
        body += ["<h2>Groups</h2>", table(names, group_rows(figures))]
    if labelled:
        body += ["<h2>Scores</h2>", _plots(scored(labelled), figures.calibration)]
        body += ["<h2>Where people differ</h2>", _disagreements(labelled)]
    return page("Holdgate: judge report", body, script=get_plotlyjs())


def _plots(rows: Sequence[tuple[float, bool]], calibration: Calibration | None) -> str:
    """Numbers only: nothing that a model wrote is in them."""
    counts = go.Figure(
        [
            go.Histogram(
                x=[score for score, label in rows if label is wanted],
                name=name,
                xbins={"start": 0, "end": 1.0001, "size": 0.05},
                opacity=0.7,
            )
            for wanted, name in ((True, "acceptable"), (False, "not acceptable"))
        ],
        {
            "barmode": "overlay",
            "title": "Scores by label",
            "xaxis": {"title": "score", "range": [0, 1]},
        },
    )
    labels = [label for _, label in rows]
    lines = [("score as it is", _reliability([score for score, _ in rows], labels))]
    if calibration is not None:
        lines.append(("calibrated", _reliability(calibration.calibrated, labels)))
    truth = go.Figure(
        [
            go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name="perfect", line={"dash": "dot"}),
            *(
                go.Scatter(
                    x=[x for x, _ in points],
                    y=[y for _, y in points],
                    mode="lines+markers",
                    name=name,
                )
                for name, points in lines
            ),
        ],
        {
            "title": f"Is the score a probability? (up to {_BINS} bins of equal size)",
            "xaxis": {"title": "score", "range": [0, 1]},
            "yaxis": {"title": "share acceptable", "range": [0, 1]},
        },
    )
    return "".join(
        each.to_html(full_html=False, include_plotlyjs=False, default_height="420px")
        for each in (counts, truth)
    )


def _reliability(scores: Sequence[float], labels: Sequence[bool]) -> list[tuple[float, float]]:
    """Mean score and share of acceptable answers of each bin."""
    ranked = sorted(zip(scores, labels, strict=True))
    bins = min(_BINS, len(ranked))
    points = []
    for number in range(bins):
        part = ranked[number * len(ranked) // bins : (number + 1) * len(ranked) // bins]
        points.append(
            (
                sum(score for score, _ in part) / len(part),
                sum(label for _, label in part) / len(part),
            )
        )
    return points


def _disagreements(labelled: Sequence[Pair]) -> str:
    """The surest mistakes first."""
    wrong = [
        (case, each)
        for case, each in labelled
        if (each.outcome is Outcome.PASS) is not case.acceptable
    ]
    wrong.sort(key=lambda pair: -abs((pair[1].score or 0.0) - 0.5))
    rows = [
        (
            case.id,
            "acceptable" if case.acceptable else "not acceptable",
            each.outcome.value
            if each.score is None
            else f"{each.outcome.value} ({each.score:.3f})",
            _excerpt(case.answer),
            _excerpt(each.rationale),
        )
        for case, each in wrong[:_SHOWN]
    ]
    shown = f"<p>{len(wrong)} of {len(labelled)}; the surest {len(rows)} are shown.</p>"
    head = ("case", "people", "judge", "answer", "the judge's reason")
    return shown + (table(head, rows) if rows else "")


def _excerpt(text: str) -> str:
    return text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + " …"
