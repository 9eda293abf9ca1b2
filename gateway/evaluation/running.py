"""Having cases judged: side by side, within a budget, and so that what is done stays done."""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from math import isnan
from pathlib import Path
from typing import Self, TypeAlias

import msgspec

from gateway.app import SystemClock
from gateway.evaluation.cases import Case, CaseError
from gateway.interviews import Interviewer, Terms
from gateway.settings import Settings
from gateway.spending import Account, Prices, Purse
from gateway.telemetry import Metrics
from gateway.upstream.routing import Router
from judges import Judge
from validators import Cause, CheckResult, Exchange, Outcome

_RATIONALE_CHARS = 2_000
_PAUSE_S = 0.5

#: Why the rest is not judged.
_ENDINGS = (Cause.BUDGET, Cause.UNAVAILABLE)

Ask: TypeAlias = Callable[[Judge, Exchange], Awaitable[CheckResult]]


class Judged(msgspec.Struct, frozen=True, omit_defaults=True):
    """What one judge said of one case; the digests say of which version of each. A cost of None is not known."""

    judge: str
    judge_digest: str
    case: str
    case_digest: str
    outcome: Outcome
    score: float | None = None
    error: str | None = None
    cause: Cause | None = None
    latency_ms: float = 0.0
    cost_usd: float | None = None
    rationale: str = ""


class Results:
    """What was judged so far, in a JSON Lines file that grows by a line with every verdict.

    Killed in mid-write, it loses the line it was writing. The file can be read by its owner only: it may quote answers.

    Raises
    ------
    CaseError
        If the file is there already and `resume` is False, it is no file of results, or it cannot be written.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        self._said: dict[tuple[str, str, str, str], Judged] = {}
        if path.exists() and not resume:
            raise CaseError(
                f"{path} is there already: go on with --resume, or remove it to begin anew"
            )
        try:
            written = path.read_bytes() if path.exists() else b""
            whole = written[: written.rfind(b"\n") + 1]
            self._read(whole)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._file = os.fdopen(descriptor, "r+b", buffering=0)
            self._file.truncate(len(whole))
        except OSError as error:
            raise CaseError(f"{path}: cannot be written: {error.strerror}") from error

    def _read(self, whole: bytes) -> None:
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self._take(msgspec.json.decode(line, type=Judged))
            except msgspec.MsgspecError as error:
                raise CaseError(f"{self.path}:{number}: not a result: {error}") from error

    def _take(self, judged: Judged) -> None:
        self._said[judged.judge, judged.judge_digest, judged.case, judged.case_digest] = judged

    def of(self, judge: Judge, case: Case) -> Judged | None:
        """What this version of the judge said of this version of the case; None if it was not asked yet."""
        return self._said.get((judge.id, _version(judge), case.id, case.digest))

    def add(self, judged: Judged) -> None:
        """Write a verdict down; it survives the end of the process. Raises `CaseError` if it cannot be written."""
        self._take(judged)
        line = msgspec.json.encode(judged) + b"\n"
        try:
            if self._file.write(line) < len(line):
                raise CaseError(f"{self.path}: cannot be written: there is no room for it")
        except OSError as error:
            raise CaseError(f"{self.path}: cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._file.close()


@asynccontextmanager
async def asking(
    settings: Settings, *, concurrency: int, budget_usd: float | None
) -> AsyncIterator[Ask]:
    """A way to ask judges of the models that the settings name, as the gateway does.

    Of one model at most `concurrency` questions are under way at once. A question that could bring the sum above `budget_usd`
    is not put: its result is an ERROR whose cause is the budget. A model that is not asked for a while because it failed again and
    again is waited for, as long as a judge has time to answer.
    """
    clock, account = SystemClock(), Account()
    router = Router(settings)
    interviewer = Interviewer(
        router, Prices(settings.models), clock, Metrics(), concurrency=concurrency
    )

    async def ask(judge: Judge, exchange: Exchange) -> CheckResult:
        loop = asyncio.get_running_loop()
        patience_s = loop.time() + settings.judges.timeout_s
        while True:
            terms = Terms(Purse(account, budget_usd), loop.time() + settings.judges.timeout_s)
            said = await interviewer.result(judge, exchange, terms)
            if said.cause is not Cause.UNAVAILABLE or loop.time() > patience_s:
                return said
            await asyncio.sleep(_PAUSE_S)

    try:
        yield ask
    finally:
        await router.close()


async def judge_all(
    judges: Sequence[Judge],
    cases: Sequence[Case],
    results: Results,
    ask: Ask,
    *,
    concurrency: int,
    advance: Callable[[], None],
) -> Cause | None:
    """Ask every judge of every case that has no verdict yet, errors included; why it ended before the end, None if it did not.

    It ends early if the budget is used up, or a model is down. At most `concurrency` cases are judged at once. `advance` is called
    for each that is done. Every verdict is in the results as soon as it is known; those that an early end prevented are not.
    """
    ended: Cause | None = None

    async def work(todo: Iterable[tuple[Judge, Case]]) -> None:
        nonlocal ended
        for judge, case in todo:
            if ended is not None:
                return
            said = await ask(judge, case.exchange)
            if said.cause in _ENDINGS:
                ended = said.cause
                return
            results.add(_judged(judge, case, said))
            advance()

    # One iterator that all share: each takes the next pair as soon as it is free.
    todo = iter([pair for pair in pairs(judges, cases) if is_open(results.of(*pair))])
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work(todo))
    except ExceptionGroup as several:
        raise several.exceptions[0] from several
    return ended


def _version(judge: Judge) -> str:
    """What may change its outcome; a judge's own digest leaves out what does not change its score, such as `pass_at`."""
    return hashlib.sha256(f"{judge.digest} {judge.model_dump_json()}".encode()).hexdigest()


def pairs(judges: Sequence[Judge], cases: Sequence[Case]) -> list[tuple[Judge, Case]]:
    """Every judge with every case."""
    return [(judge, case) for case in cases for judge in judges]


def is_open(judged: Judged | None) -> bool:
    """Whether a judge is still to be asked: it was not, or something went wrong; that it is not sure is an answer."""
    if judged is None:
        return True
    return judged.outcome is Outcome.ERROR and judged.cause is not Cause.UNSURE


def _judged(judge: Judge, case: Case, said: CheckResult) -> Judged:
    return Judged(
        judge=judge.id,
        judge_digest=_version(judge),
        case=case.id,
        case_digest=case.digest,
        outcome=said.outcome,
        score=said.score,
        error=said.error,
        cause=said.cause,
        latency_ms=said.latency_ms,
        cost_usd=None if isnan(said.cost_usd) else said.cost_usd,
        rationale=said.opinion.rationale[:_RATIONALE_CHARS] if said.opinion else "",
    )
