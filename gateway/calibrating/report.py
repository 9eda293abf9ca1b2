"""What a fitted calibrator does: as tables on the terminal and as one HTML file that needs nothing else.

Ids, tasks and model names come from outside: all of them are escaped, and none of them is near a script.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from html import escape

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs
from rich.markup import escape as markup
from rich.table import Table

from gateway import pages
from policies import Calibrator
from policies.agreement import Measure
from policies.calibration import Certificate, Knot
from policies.diagnostics import Diagnostics, Slice

#: The table of thresholds has a row for about each of so many equal steps of what is returned.
_STEPS = 20


def summary(calibrator: Calibrator, found: Diagnostics) -> Table:
    """The figures that matter most, for a terminal."""
    table = Table("figure", "value", "what it says", title=f"calibrator {calibrator.name}")
    for row in _figures(found):
        table.add_row(*row)
    for each in calibrator.certificates:
        table.add_row(markup(f"threshold, {group_of(each)}"), _threshold(each), promise(each))
    if calibrator.cost_threshold is not None:
        table.add_row("cheapest threshold", f"{calibrator.cost_threshold:.4f}", _CHEAPEST)
    for alpha, returned, threshold, labels in _offers(found):
        said = f"returned where {alpha} errors are allowed" + (f"; {labels}" if labels else "")
        table.add_row(f"offer, {threshold}", returned, said)
    return table


_CHEAPEST = "above it an answer costs less than a review, if reviews catch everything"


def _figures(found: Diagnostics) -> list[tuple[str, str, str]]:
    quality = found.quality
    return [
        ("labels", str(found.n), f"{found.errors} of them not acceptable"),
        (
            "AUROC",
            f"{quality.auroc:.3f}",
            f"how well the score orders; 0.5 is chance, the best signal alone {quality.best_single_auroc:.3f}",
        ),
        (
            "calibration error",
            f"{quality.ece_raw:.3f} → {quality.ece:.3f}",
            "of the score as it is → of the confidence (15 bins of equal mass, debiased)",
        ),
        ("Brier score", f"{quality.brier:.3f}", "mean squared error of the confidence"),
        ("AURC", f"{quality.aurc:.4f}", "mean error over all shares that might be returned"),
    ]


def _offers(found: Diagnostics) -> list[tuple[str, str, str, str]]:
    """What each share of errors would give: how much would be returned, from which threshold, what is missing."""
    rows = []
    for each in found.offers:
        more = "" if each.more_labels is None else f"about {each.more_labels} more labels needed"
        returned = "nothing" if each.threshold is None else f"{100 * each.coverage:.0f} %"
        rows.append((f"{100 * each.alpha:.3g} %", returned, _threshold(each), more))
    return rows


def group_of(certificate: Certificate) -> str:
    """For which responses it is."""
    return certificate.task or (certificate.tier.value if certificate.tier else "all")


def _threshold(certificate: Certificate) -> str:
    return "none" if certificate.threshold is None else f"{certificate.threshold:.4f}"


def promise(certificate: Certificate) -> str:
    """What a certificate promises, or why it cannot, in a sentence."""
    alpha, n = f"{100 * certificate.alpha:.3g} %", certificate.n
    if certificate.threshold is None:
        said = f"cannot {_VERB[certificate.mode]} {alpha} with {n} labels: hold everything"
        if certificate.best_alpha is not None:
            said = f"cannot {_VERB[certificate.mode]} {alpha} with {n} labels: at best {100 * certificate.best_alpha:.2g} %"
        if certificate.more_labels is not None:
            said += f"; about {certificate.more_labels} more labels needed"
        return said
    how = "certified" if certificate.mode == "certified" else "estimated, not proven"
    return (
        f"{how}: at most {alpha} errors among {100 * certificate.coverage:.0f} % returned on their own, "
        f"with probability {1 - certificate.delta:.3g}; "
        f"{certificate.errors} errors in {certificate.accepted} labels above it"
    )


_VERB = {"certified": "certify", "estimated": "promise"}


def html_report(
    calibrator: Calibrator, found: Diagnostics, *, about: Sequence[tuple[str, str]], at: datetime
) -> str:
    """The whole report as one HTML document; `about` says where the labels come from."""
    body = [
        f"<h1>Calibrator {escape(calibrator.name)}</h1>",
        pages.table(
            (), [*about, *_facts(calibrator), ("measured", at.isoformat(timespec="seconds"))]
        ),
        *_remarks(found.remarks),
        "<h2>What is promised</h2>",
        pages.table(
            ("responses", "threshold", "promise"),
            [(group_of(each), _threshold(each), promise(each)) for each in calibrator.certificates],
        )
        if calibrator.certificates
        else "<p>It has no certificate: its thresholds are whatever the policy says.</p>",
        *_offered(found),
        "<h2>Figures</h2>",
        pages.table(("figure", "value", "what it says"), _figures(found)),
        "<h2>Is the confidence true?</h2>",
        _reliability(found),
        "<h2>What a threshold costs</h2>",
        _curve(calibrator, found.curve),
        "<p>Errors are those among responses that are returned on their own; their interval holds with 95 % confidence, "
        "at one threshold chosen beforehand. Of 1,000 responses the third column goes out and the rest to people.</p>",
        pages.table(
            (
                "threshold",
                "errors when returned",
                "returned of 1,000",
                "to people",
                "errors let out",
            ),
            _thresholds(calibrator, found.curve),
        ),
        "<h2>Slices</h2>",
        *_slices(found.slices),
        "<h2>Signals</h2>",
        pages.table(("signal", "AUROC alone", "used", "what it adds", "remark"), _signals(found)),
        *_tried(found),
        "<h2>Worst mistakes</h2>",
        "<p>Not acceptable, and yet of high confidence: have a second reviewer look at these first. Wrong labels here cost most.</p>",
        pages.table(
            ("decision", "confidence", "task"),
            [(each.id, f"{each.confidence:.4f}", each.task or "") for each in found.mistakes],
        )
        if found.mistakes
        else "<p>None.</p>",
    ]
    return pages.page(f"Holdgate: calibrator {calibrator.name}", body, script=get_plotlyjs())


def _offered(found: Diagnostics) -> list[str]:
    if not found.offers:
        return []
    return [
        "<p>What others would give, all responses together. Each is a promise of its own: choose before you look.</p>",
        pages.table(("errors allowed", "returned", "threshold", "missing"), _offers(found)),
    ]


def _facts(calibrator: Calibrator) -> list[tuple[str, str]]:
    facts = [
        ("fitted", calibrator.created_at.isoformat(timespec="seconds")),
        ("for model", calibrator.model),
        ("from", f"{calibrator.source}: {', '.join(calibrator.score.signals)}"),
        ("map", calibrator.calibrator.kind),
    ]
    if calibrator.cost_threshold is not None:
        facts.append(("cheapest threshold", f"{calibrator.cost_threshold:.4f}: {_CHEAPEST}"))
    return facts


def _remarks(remarks: Sequence[str]) -> list[str]:
    lines = "".join(f"<li>{escape(each)}</li>" for each in remarks)
    return [f"<h2>Remarks</h2><ul>{lines}</ul>"] if remarks else []


def _reliability(found: Diagnostics) -> str:
    bins = found.reliability
    figure = go.Figure(
        [
            go.Scatter(x=[0, 1], y=[0, 1], mode="lines", name="perfect", line={"dash": "dot"}),
            go.Scatter(
                x=[each.confidence for each in bins],
                y=[each.acceptable.value for each in bins],
                error_y=_bars([each.acceptable for each in bins]),
                mode="lines+markers",
                name="measured, 95 %",
            ),
        ],
        {
            "title": f"Reliability ({len(bins)} bins of equal size)",
            "xaxis": {"title": "confidence", "range": [0, 1.01]},
            "yaxis": {"title": "share acceptable", "range": [0, 1.01]},
        },
    )
    return _drawn(figure)


def _bars(measures: Sequence[Measure]) -> dict[str, object]:
    return {
        "type": "data",
        "symmetric": False,
        "array": [each.high - each.value for each in measures],
        "arrayminus": [each.value - each.low for each in measures],
    }


def _curve(calibrator: Calibrator, curve: Sequence[Knot]) -> str:
    coverage = [knot.coverage for knot in curve]
    marks = [
        go.Scatter(
            x=[each.coverage],
            y=[each.errors / each.accepted],
            mode="markers",
            marker={"size": 12, "symbol": "x"},
            name=f"{each.mode} threshold",
        )
        for each in calibrator.certificates
        if each.threshold is not None and each.accepted and each.tier is each.task is None
    ]
    figure = go.Figure(
        [
            go.Scatter(
                x=coverage + coverage[::-1],
                y=[knot.high for knot in curve] + [knot.low for knot in curve][::-1],
                fill="toself",
                line={"width": 0},
                name="95 %",
                hoverinfo="skip",
            ),
            go.Scatter(
                x=coverage,
                y=[knot.risk for knot in curve],
                customdata=[knot.confidence for knot in curve],
                hovertemplate="returned %{x:.1%}, errors %{y:.2%}, threshold %{customdata:.4f}",
                mode="lines",
                name="errors",
            ),
            *marks,
        ],
        {
            "title": "Errors against the share returned on their own",
            "xaxis": {"title": "share returned", "range": [0, 1], "tickformat": ".0%"},
            "yaxis": {"title": "errors among them", "rangemode": "tozero", "tickformat": ".1%"},
        },
    )
    return _drawn(figure)


def _drawn(figure: go.Figure) -> str:
    drawn: str = figure.to_html(full_html=False, include_plotlyjs=False, default_height="420px")
    return drawn


def _thresholds(calibrator: Calibrator, curve: Sequence[Knot]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    last = 2.0
    promised = {each.threshold for each in calibrator.certificates}
    for knot in sorted(curve, key=lambda each: each.coverage, reverse=True):
        if knot.confidence not in promised and last - knot.coverage < 1 / _STEPS:
            continue
        last = knot.coverage
        rows.append(
            (
                f"{knot.confidence:.4f}",
                f"{knot.risk:.2%} ({knot.low:.2%} to {knot.high:.2%})",
                f"{1000 * knot.coverage:.0f}",
                f"{1000 * (1 - knot.coverage):.0f}",
                f"{1000 * knot.coverage * knot.risk:.1f}",
            )
        )
    return rows


def _slices(slices: Sequence[Slice]) -> Iterable[str]:
    if not slices:
        yield "<p>All labels are of one kind, or too few of each to tell apart.</p>"
        return
    failing = [each for each in slices if each.off]
    if failing:
        names = ", ".join(f"{each.by} {each.value}" for each in failing)
        yield f"<p><b>Calibration fails in:</b> {escape(names)}.</p>"
    else:
        yield "<p>In none of them calibration fails beyond chance (99 %).</p>"
    head = (
        "slice",
        "",
        "labels",
        "confidence",
        "acceptable",
        "returned",
        "errors when returned",
        "",
    )
    yield pages.table(
        head,
        [
            (
                each.by,
                each.value,
                str(each.n),
                f"{each.confidence:.3f}",
                _share(each.acceptable),
                f"{each.autonomous:.1%}",
                "–" if each.errors is None else _share(each.errors),
                "calibration fails" if each.off else "",
            )
            for each in slices
        ],
    )


def _share(measure: Measure) -> str:
    return f"{measure.value:.1%} ({measure.low:.1%} to {measure.high:.1%})"


def _signals(found: Diagnostics) -> list[tuple[str, ...]]:
    return [
        (
            each.name,
            f"{each.auroc:.3f}",
            "yes" if each.used else "no",
            "" if each.adds is None else f"{each.adds:+.4f} log loss without it",
            each.reason,
        )
        for each in sorted(found.signals, key=lambda each: -abs(each.auroc - 0.5))
    ]


def _tried(found: Diagnostics) -> list[str]:
    if not found.scorers:
        return []
    rows: list[tuple[str, ...]] = [
        *(("score", name, f"{loss:.4f}") for name, loss in found.scorers.items()),
        *(("map", name, f"{loss:.4f}") for name, loss in found.maps.items()),
    ]
    return [
        "<p>Log loss of what was tried, on labels it was not fitted on; the lowest was taken.</p>",
        pages.table(("", "tried", "log loss"), rows),
    ]
