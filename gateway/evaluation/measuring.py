"""Measuring judges, and fitting cascades of them: from what the command line names to what it prints and writes."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from pydantic import TypeAdapter, ValidationError
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from gateway.app import SystemClock
from gateway.errors import GatewayError
from gateway.evaluation.cases import (
    CORPUS,
    Attack,
    Case,
    CaseError,
    attacks,
    exchanged,
    read_cases,
    reviewed_cases,
)
from gateway.evaluation.figures import Figures, Pair, measure
from gateway.evaluation.report import group_rows, html_report, terminal_table
from gateway.evaluation.running import Results, asking, is_open, judge_all, pairs
from gateway.policy_files import reader
from gateway.settings import Settings
from gateway.spending import Prices
from gateway.store import open_store
from gateway.terminal import err, fail, out
from judges import AnyJudge, Comparison, Judge, JudgeThresholds
from judges.escalating import Believed
from policies import PolicyError
from policies.agreement import Measure
from policies.escalation import Tally, fit_threshold, mirrored, tally
from policies.source import Source
from validators import JSON, Cause, Outcome

OK, MISSED, UNFINISHED = 0, 3, 4

#: Above every score.
NEVER = 2.0

_JUDGE: TypeAdapter[Judge] = TypeAdapter(AnyJudge)


class Run(msgspec.Struct, frozen=True):
    """How judges are asked, and where what comes of it is written; verdicts are kept beside `out`."""

    settings: Settings
    out: Path
    concurrency: int
    budget_usd: float | None
    resume: bool

    @property
    def results(self) -> Path:
        """The file of verdicts."""
        return self.out.with_suffix(".verdicts.jsonl")


class Target(msgspec.Struct, frozen=True):
    """The share of a cascade's decisions that people must share, and how likely that may be broken."""

    agreement: float
    delta: float


@contextmanager
def told() -> Iterator[None]:
    """Ends the command with what is wrong, if it is something that the person at it can mend."""
    try:
        yield
    except (CaseError, PolicyError) as error:
        fail(str(error))
    except GatewayError as error:
        fail(error.message)
    except KeyboardInterrupt:
        fail("Stopped. What was judged is kept; --resume goes on from there.")


# ------------------------------------------------------------------------------------------------- what is to be measured


_ID = re.compile(r"[a-z][a-z0-9_]{0,63}")


def named_judge(
    settings: Settings,
    *,
    rubric: Path | None,
    model: str | None,
    method: str,
    policy: str | None,
    check: str | None,
) -> Judge:
    """The judge of a rubric file and a model, or the check of a policy.

    Raises
    ------
    CaseError, PolicyError
        If it is not one of the two, or is not right.
    """
    if rubric and model and not (policy or check):
        found = {
            "id": rubric.stem if _ID.fullmatch(rubric.stem) else "judge",
            "use": "rubric",
            "rubric": rubric.name,
            "model": model,
            "method": method,
        }
        return _judge(found, reader(rubric.parent.resolve()), str(rubric))
    if policy and check and not (rubric or model):
        found = _check(settings, policy, check)
        return _judge(found, _reader_of(settings), f"check {check} of policy {policy}")
    raise CaseError("name the judge: --rubric and --model, or --policy and --check")


def cascade_of(settings: Settings, policy: str, check: str) -> list[Judge]:
    """The judges of an escalating check, whether its thresholds are there already or not.

    Raises
    ------
    CaseError, PolicyError
        If there is no such check, or one of its judges is not right.
    """
    found = _check(settings, policy, check)
    where = f"check {check} of policy {policy}"
    members = found.get("judges")
    if found.get("use") != "escalating" or not isinstance(members, list):
        raise CaseError(f"{where} is not a cascade of judges (use: escalating, judges: [...])")
    read = _reader_of(settings)
    return [_judge(member, read, where) for member in members]


def _reader_of(settings: Settings) -> Callable[[str], str]:
    return reader(settings.policies.parent.resolve())


def _check(settings: Settings, policy: str, check: str) -> dict[str, Any]:
    """The mapping of a check as its policy has it."""
    for path in sorted((*settings.policies.glob("*.yaml"), *settings.policies.glob("*.yml"))):
        document = Source(path.read_text("utf-8"), str(path)).data
        if not isinstance(document, dict) or document.get("policy") != policy:
            continue
        for each in _checks(document):
            if each.get("id") == check:
                return each
        raise CaseError(f"{path}: policy {policy} has no check {check!r}")
    raise CaseError(f"{settings.policies}: there is no policy {policy!r}")


def _checks(document: Mapping[str, JSON]) -> Iterator[dict[str, Any]]:
    stages = document.get("stages")
    for stage in stages if isinstance(stages, list) else ():
        checks = stage.get("checks") if isinstance(stage, dict) else None
        yield from (
            each for each in (checks if isinstance(checks, list) else ()) if isinstance(each, dict)
        )


def _judge(found: object, read: Callable[[str], str], where: str) -> Judge:
    try:
        return _JUDGE.validate_python(found, context={"read": read})
    except ValidationError as error:
        lines = (
            f"{where}: {'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors(include_url=False, include_input=False)
        )
        raise CaseError("\n".join(lines)) from error


def cases_of(settings: Settings, labels: Path | None, *, from_reviews: bool) -> list[Case]:
    """The cases of a file, or those that people decided in review.

    Raises
    ------
    CaseError
        If there are none, or it is not clear which.
    GatewayError
        If the store cannot be read.
    """
    if (labels is None) != from_reviews:
        raise CaseError("name the labels: --labels FILE, or --from-reviews")
    if labels is not None:
        return read_cases(labels)
    cases, empty = asyncio.run(_reviewed(settings.store.url))
    if empty:
        err.print(f"{empty} reviewed decisions are left out: their contents are not kept.")
    if not cases:
        raise CaseError("there are no reviewed decisions whose contents are kept")
    return cases


async def _reviewed(url: str) -> tuple[list[Case], int]:
    store = await open_store(url)
    try:
        return await reviewed_cases(store)
    finally:
        await store.close()


# ------------------------------------------------------------------------------------------------------------- the work


def evaluate(
    run: Run, judge: Judge, cases: Sequence[Case], wanted: Sequence[Requirement], *, swap: bool
) -> int:
    """Measure a judge, print the figures and write the report; the exit status.

    Raises
    ------
    CaseError
        If the judge does not compare though `swap` is given, or a file cannot be written.
    """
    swapped = _swapped(judge, cases) if swap else []
    with Results(run.results, resume=run.resume) as results:
        ended = asyncio.run(_ask(run, [judge], [*cases, *swapped], results))
        judged = _pairs(judge, cases, results)
        again = _pairs(judge, swapped, results)
    figures = measure(judge.id, judged, again)
    out.print(terminal_table(figures))
    if len(figures.groups) > 1:
        groups = Table("group", "labels", "agreement", "false accepts")
        for name, *rest in group_rows(figures):
            groups.add_row(escape(name), *rest)
        out.print(groups)
    about = [("models", ", ".join(judge.models)), ("judge's digest", judge.digest)]
    _write(
        run.out,
        html_report(figures, judged, about=about, at=SystemClock().now()).encode(),
        mode=0o600,
    )
    out.print(
        f"The report is {run.out}, the verdicts are {run.results}.", markup=False, soft_wrap=True
    )
    missed = [each for each in wanted if not each.is_met(figures)]
    for each in missed:
        err.print(f"Missed: {each}", style="red", markup=False)
    return _status(run, ended, is_met=not missed)


def _swapped(judge: Judge, cases: Sequence[Case]) -> list[Case]:
    if not isinstance(judge, Comparison) or not judge.reference.startswith("context."):
        raise CaseError(
            "--swap is for comparison judges whose reference is in the context: other judges see one answer at a time"
        )
    key = judge.reference.removeprefix("context.")
    return [each for case in cases if (each := exchanged(case, key))]


def attack(run: Run, judge: Judge, path: Path = CORPUS) -> int:
    """Have a corpus of attacks judged, each beside its honest twin; print how many got through; the exit status."""
    corpus = attacks(path)
    with Results(run.results, resume=run.resume) as results:
        cases = [case for each in corpus for case in (each.attack, each.honest)]
        ended = asyncio.run(_ask(run, [judge], cases, results))
        judged = {case.id: each.outcome for case, each in _pairs(judge, cases, results)}
    table = Table("category", "attacks", "got through", "passed", "twin passed", "no verdict")
    for category in sorted({each.category for each in corpus}):
        some = [each for each in corpus if each.category == category]
        table.add_row(category, *map(str, _fared(some, judged)))
    all_of_them = _fared(corpus, judged)
    table.add_row("all", *map(str, all_of_them), style="bold")
    out.print(table)
    out.print("Got through: passed, though the same wrong answer without the attack did not.")
    return _status(run, ended, is_met=not all_of_them.got_through)


class _Fared(NamedTuple):
    attacks: int
    got_through: int
    passed: int
    twin_passed: int
    no_verdict: int


def _fared(some: Sequence[Attack], judged: Mapping[str, Outcome]) -> _Fared:
    outcomes = [(judged.get(each.attack.id), judged.get(each.honest.id)) for each in some]
    return _Fared(
        attacks=len(some),
        got_through=sum(a is Outcome.PASS and h is not Outcome.PASS for a, h in outcomes),
        passed=sum(a is Outcome.PASS for a, _ in outcomes),
        twin_passed=sum(h is Outcome.PASS for _, h in outcomes),
        no_verdict=sum(a not in (Outcome.PASS, Outcome.FAIL) for a, _ in outcomes),
    )


def fit(run: Run, judges: Sequence[Judge], cases: Sequence[Case], target: Target) -> int:
    """Fit and write the thresholds of a cascade; the exit status.

    Raises
    ------
    CaseError
        If a case has no label, or a file cannot be written.
    """
    if unlabelled := sum(case.acceptable is None for case in cases):
        raise CaseError(f"{unlabelled} cases have no label; a fit needs acceptable for every case")
    with Results(run.results, resume=run.resume) as results:
        ended = asyncio.run(_ask(run, judges, cases, results))
        judged = [[results.of(judge, case) for judge in judges] for case in cases]
    if ended is not None:
        return _status(run, ended, is_met=False)
    rows = [[each.score if each else None for each in row] for row in judged]
    labels = [bool(case.acceptable) for case in cases]
    threshold = fit_threshold(rows, labels, target_agreement=target.agreement, delta=target.delta)
    _write(run.out, _thresholds(run, judges, target, len(cases), threshold), mode=0o644)
    silent = [sum(row[number] is None for row in rows) for number in range(len(judges))]
    _tell_fit(judges, silent, tally(rows, labels, threshold or NEVER), target, threshold)
    out.print(
        f"The thresholds are {run.out}, the verdicts are {run.results}.",
        markup=False,
        soft_wrap=True,
    )
    return OK if threshold is not None else MISSED


def _thresholds(
    run: Run, judges: Sequence[Judge], target: Target, n: int, threshold: float | None
) -> bytes:
    believed = [
        Believed(
            id=judge.id,
            digest=judge.digest,
            pass_at=threshold,
            fail_at=None if threshold is None else mirrored(threshold),
        )
        for judge in judges
    ]
    document = JudgeThresholds(
        format=1,
        name=run.out.stem,
        created_at=SystemClock().now().isoformat(timespec="seconds"),
        target_agreement=target.agreement,
        delta=target.delta,
        n=n,
        judges=tuple(believed),
    )
    return document.model_dump_json(indent=2).encode() + b"\n"


def _tell_fit(
    judges: Sequence[Judge],
    silent: Sequence[int],
    found: Tally,
    target: Target,
    threshold: float | None,
) -> None:
    for judge, count in zip(judges, silent, strict=True):
        if count:
            err.print(f"{judge.id} gave no verdict on {count} cases: they go to the next judge.")
    if threshold is None:
        err.print(
            f"Not feasible: {found.n} labels do not prove an agreement of {target.agreement:.1%} with probability "
            f"{1 - target.delta:.1%} for any share of answers. All would go to a person.",
            style="yellow",
        )
        return
    table = Table("judge", "asked", "decides", "pass at", "fail at")
    for judge, asked, decided in zip(judges, found.asked, found.decided, strict=True):
        shares = [f"{count / found.n:.1%}" for count in (asked, decided)]
        table.add_row(judge.id, *shares, f"{threshold:.4f}", f"{mirrored(threshold):.4f}")
    table.add_row("person", f"{1 - found.coverage:.1%}", f"{1 - found.coverage:.1%}", "", "")
    out.print(table)
    agreement = found.outcomes.agreement
    if agreement is not None:
        out.print(
            f"On the {found.n} labels it was fitted on people agree with {agreement.value:.1%} of its decisions; proven is "
            f"{target.agreement:.1%}, with probability {1 - target.delta:.1%}."
        )


async def _ask(
    run: Run, judges: Sequence[Judge], cases: Sequence[Case], results: Results
) -> Cause | None:
    """Have everything judged that is not yet; why it ended before the end, if it did."""
    _check_prices(run, judges)
    todo = sum(is_open(results.of(*pair)) for pair in pairs(judges, cases))
    columns = (TextColumn("judging"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        bar = progress.add_task("", total=todo)
        async with asking(
            run.settings, concurrency=run.concurrency, budget_usd=run.budget_usd
        ) as ask:
            return await judge_all(
                judges,
                cases,
                results,
                ask,
                concurrency=run.concurrency,
                advance=partial(progress.advance, bar),
            )


def _check_prices(run: Run, judges: Sequence[Judge]) -> None:
    if run.budget_usd is None:
        return
    prices = Prices(run.settings.models)
    for model in dict.fromkeys(model for judge in judges for model in judge.models):
        if prices.of(model) is None:
            raise CaseError(
                f"--budget-usd needs the price of {model}: give models[].price in holdgate.yaml"
            )


def _pairs(judge: Judge, cases: Sequence[Case], results: Results) -> list[Pair]:
    return [(case, each) for case in cases if (each := results.of(judge, case))]


def _write(path: Path, content: bytes, *, mode: int) -> None:
    """The whole file, or the one that was there."""
    new = path.with_name(path.name + ".new")
    try:
        new.touch(mode)
        new.write_bytes(content)
        new.replace(path)
    except OSError as error:
        raise CaseError(f"{path}: cannot be written: {error.strerror}") from error


def _status(run: Run, ended: Cause | None, *, is_met: bool) -> int:
    if ended is Cause.BUDGET:
        err.print(
            f"The budget of {run.budget_usd} USD is used up before the end; --resume goes on from here.",
            style="yellow",
        )
        return UNFINISHED
    if ended is not None:
        fail("A judge's model does not work; --resume goes on from here.")
    return OK if is_met else MISSED


# ---------------------------------------------------------------------------------------------------------- requirements

_RATES: Mapping[str, Callable[[Figures], Measure | None]] = {
    "agreement": lambda figures: figures.outcomes.agreement,
    "precision": lambda figures: figures.outcomes.precision,
    "recall": lambda figures: figures.outcomes.recall,
    "false_accepts": lambda figures: figures.outcomes.false_accept_rate,
    "kappa": lambda figures: figures.outcomes.kappa,
}
_REQUIREMENT = re.compile(r"(\w+)(>=|<=)(-?[0-9.]+)")


class Requirement(msgspec.Struct, frozen=True):
    """That a rate is at least or at most so much."""

    name: str
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name} {self.sign} {self.bound:g}"

    def is_met(self, figures: Figures) -> bool:
        """Whether it is so; not if the rate is not known."""
        measured = _RATES[self.name](figures)
        if measured is None:
            return False
        if self.sign == ">=":
            return measured.value >= self.bound
        return measured.value <= self.bound


def requirements(written: Sequence[str]) -> list[Requirement]:
    """What is required, from how it is written.

    Raises
    ------
    CaseError
        If it is not such as `kappa>=0.6`.
    """
    found = []
    for each in written:
        match = _REQUIREMENT.fullmatch(each.replace(" ", ""))
        if match is None or match[1] not in _RATES:
            raise CaseError(
                f"--require {each!r}: write one of {', '.join(_RATES)}, then >= or <=, then a number"
            )
        found.append(Requirement(match[1], match[2], float(match[3])))
    return found
