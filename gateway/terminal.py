"""What every command shares: the consoles, where the settings come from, how to fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from gateway.errors import SettingsError
from gateway.settings import Settings, load_settings

out = Console()
err = Console(stderr=True)

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="holdgate.yaml; default: ./holdgate.yaml if there is one"),
]


def config_path(given: Path | None) -> Path | None:
    """The settings file: as given, as HOLDGATE_CONFIG says, or ./holdgate.yaml if there is one."""
    if given is not None:
        return given
    named = os.environ.get("HOLDGATE_CONFIG")
    default = Path("holdgate.yaml")
    return Path(named) if named else default if default.exists() else None


def settings_at(path: Path | None, *, secrets: bool = True) -> Settings:
    """The settings of a file and the environment; ends the command with every mistake in them.

    Without `secrets` the variables that hold providers' keys need not be set.
    """
    try:
        return load_settings(path, os.environ, secrets=secrets)
    except SettingsError as error:
        fail(str(error))


def fail(message: str, status: int = 1) -> NoReturn:
    """End the command with a message and an exit status."""
    err.print(message, style="red", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(status)
