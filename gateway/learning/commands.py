"""`holdgate export` and `holdgate learn`: what the command line takes."""

from __future__ import annotations

import asyncio
import importlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, TypeVar

import orjson
import typer

from gateway import economics
from gateway.errors import GatewayError
from gateway.learning import exporting
from gateway.learning.exporting import Format
from gateway.learning.samples import samples
from gateway.policy_files import load
from gateway.settings import Settings
from gateway.spending import Prices
from gateway.store import SqlStore, open_store
from gateway.terminal import ConfigOption, config_path, err, fail, settings_at
from policies import CalibrationError, Policy, PolicyError

T = TypeVar("T")

learn = typer.Typer(
    no_args_is_help=True, help="See what goes wrong again and again, and whom to ask about what."
)

_SINCE = "a duration until now, such as 90m or 7d, or a time, such as 2030-01-31"
PolicyOption = Annotated[str | None, typer.Option(help="only responses of that policy")]
OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", help="the file; default: standard output")
]


def export(
    form: Annotated[Format, typer.Option("--format", help="what the file is for")],
    since: Annotated[str | None, typer.Option(help=f"labelled since then: {_SINCE}")] = None,
    policy: PolicyOption = None,
    out: OutOption = None,
    config: ConfigOption = None,
) -> None:
    """Write what people decided as JSON Lines.

    sft: OpenAI's supervised fine-tuning; preference: its preference pairs; kto: TRL's desirable and undesirable answers;
    labels: what `holdgate calibrate fit` reads; eval: what `holdgate judge eval` reads. Content is let out as the policy's
    `content` says.
    """
    settings = settings_at(config_path(config), secrets=False)
    policies = policies_of(settings, policy)
    at = _moment(since) if since else None
    forms = {
        Format.SFT: exporting.sft,
        Format.PREFERENCE: exporting.preference,
        Format.KTO: exporting.kto,
        Format.LABELS: exporting.labels(policies),
        Format.EVAL: exporting.judged,
    }
    left_out: Counter[str] = Counter()

    async def write(store: SqlStore) -> int:
        count = 0
        found = samples(store, policies, since=at, policy=policy)
        with exporting.written(out) as file:
            async for line in exporting.lines(found, forms[form], left_out):
                file.write(line)
                count += 1
        return count

    count = with_store(settings, write)
    reasons = ", ".join(f"{number} {why}" for why, number in sorted(left_out.items()))
    err.print(f"{count} lines. Left out: {reasons or 'nothing'}.", highlight=False)


@learn.command("pick")
def pick_command(
    count: Annotated[int, typer.Option("--n", min=1, max=5000, help="how many")] = 50,
    source: Annotated[
        str,
        typer.Option(
            "--from", help="unlabelled: whom to ask about next; buffer: what to train on first"
        ),
    ] = "unlabelled",
    since: Annotated[str, typer.Option(help=_SINCE)] = "7d",
    policy: PolicyOption = None,
    out: OutOption = None,
    config: ConfigOption = None,
) -> None:
    """Pick responses that teach much and differ from each other, and write them as JSON Lines.

    Each weighs 1 / (confidence + 0.01). From `unlabelled`, responses that nobody has judged; from `buffer`, those that people
    corrected, rejected, or approved though the policy was unsure.
    """
    picking = _analysis("gateway.learning.picking")
    settings = settings_at(config_path(config), secrets=False)
    policies = policies_of(settings, policy)
    if source not in list(picking.Source):
        fail(f"--from is unlabelled or buffer, not {source!r}")
    at = _moment(since)

    async def write(store: SqlStore) -> tuple[int, int]:
        found, seen = await picking.candidates(
            store, policies, picking.Source(source), since=at, policy=policy
        )
        count_written = 0
        with exporting.written(out) as file:
            for each in picking.picked(found, count):
                if (line := await picking.line_of(store, policies, each)) is not None:
                    file.write(orjson.dumps(line) + b"\n")
                    count_written += 1
        return count_written, seen

    written, seen = with_store(settings, write)
    err.print(f"{written} of {seen} responses.", highlight=False)


@learn.command()
def report(
    since: Annotated[str, typer.Option(help=_SINCE)] = "7d",
    policy: PolicyOption = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="the HTML file")] = Path("report.html"),
    embeddings: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="group responses by that model's embeddings, not by their words; texts go to its provider, but for those "
            "that a policy does not keep in full",
        ),
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Report what people did not accept, in patterns with examples and what could be done: as HTML, and as Markdown beside it."""
    weekly = _analysis("gateway.learning.weekly")
    from gateway.learning.report import html_report, markdown_report  # noqa: PLC0415 - likewise

    settings = settings_at(config_path(config), secrets=embeddings is not None)
    policies = policies_of(settings, policy)
    until = datetime.now(UTC)
    at = _moment(since)

    async def read(store: SqlStore) -> Any:
        found = samples(store, policies, since=at - (until - at), policy=policy)
        if embeddings is None:
            return await weekly.weekly(found, policies, since=at, until=until)
        from gateway.learning.embedding import embedder  # noqa: PLC0415 - who asks no model needs no way to it

        async with embedder(settings, embeddings) as embed:
            named = (embeddings, embed)
            return await weekly.weekly(found, policies, since=at, until=until, embedding=named)

    found = with_store(settings, read)
    for file, text in (
        (out, html_report(found)),
        (out.with_suffix(".md"), markdown_report(found)),
    ):
        with told(), exporting.written(file) as opened:
            opened.write(text.encode("utf-8", "replace"))
    err.print(
        f"{found.now.mistakes} of {found.now.judged} judged responses were not accepted, in "
        f"{len(found.patterns)} patterns: {out}, {out.with_suffix('.md')}",
        highlight=False,
        soft_wrap=True,
    )


def _analysis(module: str) -> ModuleType:
    """A module that needs the extra `analysis`; ends the command if that is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in ("numpy", "scipy", "sklearn"):
            raise
        fail(f"This needs {missing}: install holdgate[analysis].")


def policies_of(settings: Settings, wanted: str | None) -> Mapping[str, Policy]:
    """The policies by name; ends the command if they are wrong or the wanted one is not there and never was."""
    try:
        loaded = load(settings.policies, settings.calibrators, Prices(settings.models))
    except (PolicyError, CalibrationError, OSError) as error:
        fail(str(error))
    found = {each.policy: each for each in loaded.policies.policies}
    if wanted is not None and wanted not in found:
        err.print(f"There is no policy {wanted!r} now; what is there of it is masked.")
    return found


def with_store(settings: Settings, act: Callable[[SqlStore], Awaitable[T]]) -> T:
    """What `act` makes of the store; ends the command with what is wrong with it."""

    async def run() -> T:
        store = await open_store(settings.store.url)
        try:
            return await act(store)
        finally:
            await store.close()

    with told():
        return asyncio.run(run())


@contextmanager
def told() -> Iterator[None]:
    """Ends the command with what is wrong with the store or a file."""
    try:
        yield
    except GatewayError as error:
        fail(error.message)
    except OSError as error:
        fail(f"{error.filename or 'the file'}: cannot be written: {error.strerror}")


def _moment(since: str) -> datetime:
    now = datetime.now(UTC)
    try:
        at = economics.moment_of(since, now)
    except ValueError as error:
        fail(str(error))
    if at >= now:
        fail(f"--since {since}: that time is not past.")
    return at
