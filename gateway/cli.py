"""The command line."""

from __future__ import annotations

import os
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import orjson
import typer
from rich.table import Table

from gateway import __version__, economics
from gateway.auth import new_key
from gateway.calibrating.commands import calibrate
from gateway.evaluation.commands import judge
from gateway.learning.commands import export, learn
from gateway.operating import labels, resume, status, with_store
from gateway.recording import new_id
from gateway.records import Role
from gateway.settings import PACKAGED_CONFIG
from gateway.spending import Prices
from gateway.store import SqlStore
from gateway.terminal import ConfigOption, config_path, err, fail, out, settings_at
from policies import CalibrationError, PolicyError, artefact_schema, json_schema, staleness

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Checks what a model said before anybody acts on it.",
)
policy = typer.Typer(no_args_is_help=True, help="Check policies and help editors with them.")
key = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
app.add_typer(policy, name="policy")
app.add_typer(key, name="key")
app.add_typer(judge, name="judge")
app.add_typer(calibrate, name="calibrate")
app.add_typer(labels, name="labels")
app.command()(status)
calibrate.command()(resume)
app.add_typer(learn, name="learn")
app.command()(export)


def main() -> None:
    """Run the command line."""
    app()


@app.command()
def version() -> None:
    """Print the version."""
    out.print(__version__)


@app.command()
def serve(
    config: ConfigOption = None,
    host: Annotated[str | None, typer.Option(help="overrides listen.host")] = None,
    port: Annotated[
        int | None, typer.Option(help="overrides listen.port; 0 takes any free one")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="overrides workers")] = None,
) -> None:
    """Run the gateway."""
    from gateway.policy_files import load  # noqa: PLC0415 - other commands need no policies
    from gateway.serving import become_server  # noqa: PLC0415 - other commands need no web server

    given = {
        "HOLDGATE_LISTEN_HOST": host,
        "HOLDGATE_LISTEN_PORT": port,
        "HOLDGATE_WORKERS": workers,
    }
    os.environ.update({name: str(value) for name, value in given.items() if value is not None})
    path = config_path(config)
    settings = settings_at(path)
    # The server would say the same of a mistake, but from deep within its start.
    try:
        load(settings.policies, settings.calibrators, Prices(settings.models))
    except (PolicyError, CalibrationError, OSError) as error:
        fail(str(error))
    with_store(path, SqlStore.ping)
    become_server(path)


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="where to write the files")] = Path()) -> None:
    """Write holdgate.yaml, the starter policies and what they use, ready to be edited."""
    target = folder / "holdgate.yaml"
    if target.exists():
        fail(f"{target} is there already; remove it, or choose another folder.")
    shutil.copytree(PACKAGED_CONFIG, folder, dirs_exist_ok=True)
    out.print(f"Wrote {target}, policies/ and what they use. Next: [b]holdgate serve[/b]")


@app.command()
def demo(
    port: Annotated[int, typer.Option(help="the gateway's port")] = 8080,
    once: Annotated[bool, typer.Option(help="end after the table instead of staying up")] = False,
) -> None:
    """Show every action on a scripted model: no key, no network."""
    from gateway.demo.show import show  # noqa: PLC0415 - needs the extra `demo`

    raise typer.Exit(show(port, once=once))


@app.command()
def demo_learn(
    results: Annotated[
        Path, typer.Option("--out", "-o", help="the folder for artefact and report")
    ] = Path(".demo"),
    seed: Annotated[int, typer.Option(help="in which order the orders come")] = 1,
) -> None:
    """Learn from reviews on a real, small model: observe, calibrate, enforce, and see the promise kept and the drift found."""
    from gateway.demo.learn import learn  # noqa: PLC0415 - needs `demo` and `analysis`

    raise typer.Exit(learn(results, seed))


@app.command()
def demo_upstream(
    port: Annotated[int, typer.Option(help="0 takes any free one")] = 9100,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
) -> None:
    """Run the scripted upstream of the demo and the tests."""
    from gateway.demo import main as run  # noqa: PLC0415 - needs the extra `demo`

    run(port=port, host=host)


@policy.command()
def lint(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="the policies folder; default: as configured")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Check policies: exits 1 with file:line:column of every problem, 0 if there are only warnings or none.

    A calibrator or thresholds fitted for another version of the judges and checks are a problem too.
    """
    from gateway.policy_files import load  # noqa: PLC0415 - only this command needs it

    settings = settings_at(config_path(config), secrets=False)
    count, stale = 0, list[str]()
    for folder in paths or [settings.policies]:
        calibrators = settings.calibrators if not paths else folder.parent / "calibrators"
        try:
            loaded = load(folder, calibrators, Prices(settings.models))
        except (PolicyError, CalibrationError, OSError) as error:
            fail(str(error))
        for problem in loaded.policies.warnings:
            err.print(
                f"warning: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
        for each in loaded.policies.policies:
            name = each.confidence.calibrator
            if name is not None and name not in loaded.calibrators:
                message = f"warning: policy {each.policy}: there is no calibrator {name!r} in {calibrators}"
                err.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
            stale += [f"policy {each.policy}: {why}" for why in staleness(each, loaded.calibrators)]
        count += len(loaded.policies.policies)
    if stale:
        fail("\n".join(stale))
    out.print(f"{count} policies, no problems" if count != 1 else "1 policy, no problems")


@policy.command()
def schema(
    calibrator: Annotated[
        bool, typer.Option(help="of calibrator files instead of policies")
    ] = False,
) -> None:
    """Print the JSON Schema of policy files, for editors."""
    document = artefact_schema() if calibrator else json_schema()
    sys.stdout.write(orjson.dumps(document, option=orjson.OPT_INDENT_2).decode() + "\n")


@key.command("create")
def create_key(
    name: Annotated[str, typer.Argument(help="who or what will use it")],
    role: Annotated[Role, typer.Option(help="client, reviewer or admin")] = Role.CLIENT,
    config: ConfigOption = None,
) -> None:
    """Make an API key and print it; it is shown this once only."""
    now = datetime.now(UTC)
    made, secret = new_key(new_id("key", now), name, role, now)
    with_store(config, lambda store: store.create_key(made))
    err.print(f"Key {name!r} with the role {role.value}; it is shown this once:")
    sys.stdout.write(secret + "\n")


@key.command("list")
def list_keys(config: ConfigOption = None) -> None:
    """List API keys."""
    table = Table("name", "role", "created", "revoked")
    for each in with_store(config, lambda store: store.keys()):
        revoked = each.revoked_at.isoformat(timespec="seconds") if each.revoked_at else ""
        table.add_row(
            each.name, each.role.value, each.created_at.isoformat(timespec="seconds"), revoked
        )
    out.print(table)


@key.command("revoke")
def revoke_key(name: Annotated[str, typer.Argument()], config: ConfigOption = None) -> None:
    """Revoke an API key; it stops working within five seconds."""
    with_store(config, lambda store: store.revoke_key(name, datetime.now(UTC)))
    out.print(f"Revoked {name!r}.")


@app.command("economics")
def show_economics(
    since: Annotated[
        str,
        typer.Option(help="a duration until now, such as 90m or 7d, or a time, such as 2030-01-31"),
    ] = "24h",
    config: ConfigOption = None,
) -> None:
    """Print what rules, judges and people did and cost."""
    try:
        at = economics.moment_of(since, datetime.now(UTC))
    except ValueError as error:
        fail(str(error))
    found = with_store(config, lambda store: store.economics(at))
    usd_per_minute = settings_at(config_path(config), secrets=False).review.usd_per_minute
    table = Table("layer")
    for column in ("requests", "share", "USD", "cost unknown", "p50 ms", "p95 ms"):
        table.add_column(column, justify="right")
    for row in economics.rows(found, usd_per_minute):
        p50_ms, p95_ms = row.latency_p50_ms, row.latency_p95_ms
        table.add_row(
            row.layer,
            str(row.requests),
            "" if row.share is None else f"{row.share:.1%}",
            "not known" if row.usd is None else f"{row.usd:.4f}",
            str(row.unknown),
            "" if p50_ms is None else f"{p50_ms:.1f}",
            "" if p95_ms is None else f"{p95_ms:.1f}",
        )
    out.print(table)
    out.print(
        f"{found.decisions} decisions since {at.isoformat(timespec='seconds')}. People worked "
        f"{found.person_minutes:.1f} minutes on tasks they had claimed. "
        f"Judges cost {found.abandoned_usd:.4f} USD that no decision carries."
    )


if __name__ == "__main__":
    main()
