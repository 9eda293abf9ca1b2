"""The weekly report: the same as one HTML file that needs nothing else and as Markdown.

What models, callers and reviewers wrote is hostile: in the HTML all of it is escaped and there is no script, in the Markdown no
character of it means anything; in both, characters that cannot be seen or turn the others round are replaced.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from gateway.learning.weekly import Counts, Mistake, Pattern, Weekly
from gateway.pages import page, table

_PATTERNS = 20
_ROWS = 12
_EXCERPT_CHARS = 250
_SPECIAL = re.compile(r"([\\`*_\[\]|~$#!@])")

_COUNTS = ("judged", "not accepted", "share", "corrected", "rejected", "went out", "disputed")
_EXAMPLE = ("decision", "policy", "confidence", "asked and answered")

Row = Sequence[str]

_NOTE = (
    "Shares are of what was judged. What is judged is mostly not drawn by lot, so they are no estimate for all responses: "
    "that is the error escape rate of holdgate status. What went out had been answered before anybody looked."
)
_NOTHING = "There are none: nothing was found that people did not accept."


def html_report(found: Weekly) -> str:
    """The report as one HTML document."""
    body = ["<h1>What went wrong</h1>", *_paragraphs([_period(found)])]
    body += [table(("", *_COUNTS), _times(found)), *_paragraphs([_NOTE]), "<h2>Patterns</h2>"]
    body += _paragraphs(_summary(found))
    for each in found.patterns[:_PATTERNS]:
        levers = "".join(f"<li>{escape(lever)}</li>" for lever in each.levers)
        body += [f"<h3>{escape(_title(each))}</h3>", *_paragraphs([_facts(each)])]
        body += [f"<ul>{levers}</ul>", table(*_examples(each))]
    for title, head, rows in _breakdowns(found):
        body += [f"<h2>{escape(title)}</h2>", table(head, rows)]
    return page("Holdgate: what went wrong", body)


def markdown_report(found: Weekly) -> str:
    """The report as Markdown."""
    parts = ["# What went wrong", _plain(_period(found)), _grid(("", *_COUNTS), _times(found))]
    parts += [_plain(_NOTE), "## Patterns", *map(_plain, _summary(found))]
    for each in found.patterns[:_PATTERNS]:
        parts += [f"### {_plain(_title(each))}", _plain(_facts(each))]
        parts += ["\n".join(f"- {_plain(lever)}" for lever in each.levers), _grid(*_examples(each))]
    for title, head, rows in _breakdowns(found):
        parts += [f"## {title}", _grid(head, rows)]
    return "\n\n".join(parts) + "\n"


def _paragraphs(texts: Iterable[str]) -> list[str]:
    return [f"<p>{escape(text)}</p>" for text in texts]


def _period(found: Weekly) -> str:
    since, until = (at.isoformat(timespec="minutes") for at in (found.since, found.until))
    return f"Labels given from {since} to {until}."


def _times(found: Weekly) -> list[Row]:
    before = "as long before"
    return [("this time", *_numbers(found.now)), (before, *_numbers(found.before))]


def _summary(found: Weekly) -> list[str]:
    if not found.patterns:
        return [_NOTHING]
    how = "the words they share"
    if found.embedded_by is not None:
        how = f"embeddings of {_seen(found.embedded_by)}"
    lines = [f"Within a category, responses are grouped by {how}."]
    if (more := len(found.patterns) - _PATTERNS) > 0:
        lines.append(f"The {_PATTERNS} greatest; {more} smaller ones are not shown.")
    if found.not_grouped:
        lines.append(f"{found.not_grouped} of the mistakes are counted, but not grouped.")
    return lines


def _breakdowns(found: Weekly) -> list[tuple[str, Row, list[Row]]]:
    if not found.now.mistakes:
        return []
    policies = [(name, *_numbers(each)) for name, each in _greatest(found.policies)]
    categories = [
        (_seen(name), *map(str, (each.mistakes, each.corrected, each.rejected, each.went_out)))
        for name, each in _greatest(found.categories)
    ]
    few = ("not accepted", "corrected", "rejected", "went out")
    return [
        ("Policies", ("", *_COUNTS), _cut(policies, len(found.policies))),
        ("Categories", ("", *few), _cut(categories, len(found.categories))),
    ]


def _greatest(counts: Mapping[str, Counts]) -> list[tuple[str, Counts]]:
    return sorted(counts.items(), key=lambda item: (-item[1].mistakes, item[0]))[:_ROWS]


def _cut(rows: Sequence[Row], count: int) -> list[Row]:
    more = count - len(rows)
    return [*rows, *([(f"and {more} more", *[""] * (len(rows[0]) - 1))] if more else [])]


def _numbers(counts: Counts) -> Row:
    share = "–" if counts.share is None else f"{counts.share:.1%}"
    rest = (counts.corrected, counts.rejected, counts.went_out, counts.disputed)
    return (str(counts.judged), str(counts.mistakes), share, *map(str, rest))


def _title(pattern: Pattern) -> str:
    about = ", ".join(pattern.terms)
    return _seen(f"{pattern.category}: {about}" if about else pattern.category)


def _facts(pattern: Pattern) -> str:
    count = len(pattern.mistakes)
    out = sum(each.went_out for each in pattern.mistakes)
    policies = ", ".join(sorted({each.policy for each in pattern.mistakes}))
    return f"{count} {'response' if count == 1 else 'responses'} of {policies}; {out} went out."


def _examples(pattern: Pattern) -> tuple[Row, list[Row]]:
    comments = [each.comment for each in pattern.examples]
    if not any(comments):
        return _EXAMPLE, [_example(each) for each in pattern.examples]
    rows: list[Row] = [(*_example(each), _excerpt(each.comment or "")) for each in pattern.examples]
    return (*_EXAMPLE, "the reviewer says"), rows


def _example(mistake: Mistake) -> Row:
    confidence = "–" if mistake.confidence is None else f"{mistake.confidence:.2f}"
    words = mistake.words or ("not shown: the policy keeps content to itself",)
    return mistake.decision_id, mistake.policy, confidence, "\n".join(map(_excerpt, words))


def _excerpt(text: str) -> str:
    return _seen(text if len(text) <= _EXCERPT_CHARS else text[:_EXCERPT_CHARS] + " …")


def _seen(text: str) -> str:
    """The text with what is not seen, and what turns the rest round, replaced."""
    return "".join(each if each.isprintable() or each == "\n" else "\ufffd" for each in text)


def _grid(head: Row, rows: Iterable[Row]) -> str:
    lines = (head, *rows)
    top, *rest = (f"| {' | '.join(map(_plain, line))} |" for line in lines)
    return "\n".join([top, f"|{'---|' * len(head)}", *rest])


def _plain(text: str) -> str:
    """The text on one line, with nothing in it that Markdown or HTML would act on."""
    line = escape(" ".join(_seen(text).split()), quote=False)
    line = _SPECIAL.sub(r"\\\1", line)
    return line.replace("://", ":\\/\\/").replace("www.", "www\\.")
