"""The command line."""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, NoReturn, TypeVar

import orjson
import typer
from rich.console import Console
from rich.table import Table

from gateway import __version__
from gateway.auth import new_key
from gateway.errors import GatewayError, SettingsError
from gateway.recording import new_id
from gateway.records import Role
from gateway.settings import PACKAGED_CONFIG, Settings, load_settings
from gateway.store import SqlStore, open_store
from policies import CalibrationError, PolicyError, artefact_schema, json_schema

T = TypeVar("T")

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Checks what a model said before anybody acts on it.",
)
policy = typer.Typer(no_args_is_help=True, help="Check policies and help editors with them.")
key = typer.Typer(no_args_is_help=True, help="Make, list and revoke API keys.")
app.add_typer(policy, name="policy")
app.add_typer(key, name="key")

out = Console()
err = Console(stderr=True)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="holdgate.yaml; default: ./holdgate.yaml if there is one"),
]


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
    path = _config_path(config)
    settings = _settings(path)
    # The server would say the same of a mistake, but from deep within its start.
    try:
        load(settings.policies, settings.calibrators)
    except (PolicyError, CalibrationError, OSError) as error:
        _fail(str(error))
    _with_store(path, SqlStore.ping)
    become_server(path)


@app.command()
def init(folder: Annotated[Path, typer.Argument(help="where to write the files")] = Path()) -> None:
    """Write holdgate.yaml, the starter policies and what they use, ready to be edited."""
    target = folder / "holdgate.yaml"
    if target.exists():
        _fail(f"{target} is there already; remove it, or choose another folder.")
    shutil.copytree(PACKAGED_CONFIG, folder, dirs_exist_ok=True)
    out.print(f"Wrote {target}, policies/ and what they use. Next: [b]holdgate serve[/b]")


@app.command()
def demo(
    port: Annotated[int, typer.Option(help="the gateway's port")] = 8080,
    once: Annotated[bool, typer.Option(help="end after the table instead of staying up")] = False,
) -> None:
    """Show every action on a scripted model: no key, no network."""
    from gateway.demo.show import show  # noqa: PLC0415 - needs the optional `openai` client

    raise typer.Exit(show(port, once=once))


@app.command()
def demo_upstream(
    port: Annotated[int, typer.Option(help="0 takes any free one")] = 9100,
    host: Annotated[str, typer.Option()] = "127.0.0.1",
) -> None:
    """Run the scripted upstream of the demo and the tests."""
    from gateway.demo import main as run  # noqa: PLC0415 - only this command needs it

    run(port=port, host=host)


@policy.command()
def lint(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="the policies folder; default: as configured")
    ] = None,
    config: ConfigOption = None,
) -> None:
    """Check policies: exits 1 with file:line:column of every problem, 0 if there are only warnings or none."""
    from gateway.policy_files import load  # noqa: PLC0415 - only this command needs it

    settings = _settings(_config_path(config), secrets=False)
    count = 0
    for folder in paths or [settings.policies]:
        calibrators = settings.calibrators if not paths else folder.parent / "calibrators"
        try:
            loaded = load(folder, calibrators)
        except (PolicyError, CalibrationError, OSError) as error:
            _fail(str(error))
        for problem in loaded.policies.warnings:
            err.print(
                f"warning: {problem}", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
        for each in loaded.policies.policies:
            name = each.confidence.calibrator
            if name is not None and name not in loaded.calibrators:
                message = f"warning: policy {each.policy}: there is no calibrator {name!r} in {calibrators}"
                err.print(message, style="yellow", markup=False, highlight=False, soft_wrap=True)
        count += len(loaded.policies.policies)
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
    _with_store(config, lambda store: store.create_key(made))
    err.print(f"Key {name!r} with the role {role.value}; it is shown this once:")
    sys.stdout.write(secret + "\n")


@key.command("list")
def list_keys(config: ConfigOption = None) -> None:
    """List API keys."""
    table = Table("name", "role", "created", "revoked")
    for each in _with_store(config, lambda store: store.keys()):
        revoked = each.revoked_at.isoformat(timespec="seconds") if each.revoked_at else ""
        table.add_row(
            each.name, each.role.value, each.created_at.isoformat(timespec="seconds"), revoked
        )
    out.print(table)


@key.command("revoke")
def revoke_key(name: Annotated[str, typer.Argument()], config: ConfigOption = None) -> None:
    """Revoke an API key; it stops working within five seconds."""
    _with_store(config, lambda store: store.revoke_key(name, datetime.now(UTC)))
    out.print(f"Revoked {name!r}.")


def _with_store(config: Path | None, act: Callable[[SqlStore], Awaitable[T]]) -> T:
    url = _settings(_config_path(config), secrets=False).store.url

    async def run() -> T:
        store = await open_store(url)
        try:
            return await act(store)
        finally:
            await store.close()

    try:
        return asyncio.run(run())
    except GatewayError as error:
        _fail(error.message)


def _config_path(given: Path | None) -> Path | None:
    if given is not None:
        return given
    named = os.environ.get("HOLDGATE_CONFIG")
    default = Path("holdgate.yaml")
    return Path(named) if named else default if default.exists() else None


def _settings(path: Path | None, *, secrets: bool = True) -> Settings:
    try:
        return load_settings(path, os.environ, secrets=secrets)
    except SettingsError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(1)


if __name__ == "__main__":
    main()
