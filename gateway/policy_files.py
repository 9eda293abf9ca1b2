"""Policies and calibrators from their folders, reloaded when a file changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson
import structlog

from gateway import sse
from gateway.errors import ResponseBlocked
from gateway.window import Window
from policies import (
    CalibrationError,
    Calibrator,
    Policy,
    PolicyError,
    PolicySet,
    Problem,
    StreamMode,
    effective_stream,
    load_calibrator,
    load_policies,
    run_stage,
)
from validators import Choice, Exchange, Passage

_log = structlog.get_logger()
_POLL_S = 1.0
_REHEARSAL = "Call +1 212 555 0100, or write to ann@example.com about 4111 1111 1111 1111."
_MAX_FILE_BYTES = 4_000_000


@dataclass(frozen=True, slots=True)
class Loaded:
    """What the folders held at one moment."""

    policies: PolicySet
    calibrators: Mapping[str, Calibrator]


def load(policies: Path, calibrators: Path) -> Loaded:
    """The policies (`*.yaml`, in order of their names) and calibrators (`*.json`) of two folders.

    Files that policies name (schemas) are looked up beside the policies folder, and nowhere else.

    Raises
    ------
    PolicyError, CalibrationError
        With every problem found.
    """
    if not policies.is_dir():
        raise PolicyError(
            [
                Problem(
                    str(policies),
                    1,
                    1,
                    "there is no such folder; `policies` in holdgate.yaml names it",
                )
            ]
        )
    files = sorted(
        path
        for path in policies.iterdir()
        if path.suffix in (".yaml", ".yml") and not path.name.startswith(".")
    )
    read = _reader(policies.parent.resolve())
    named = {}
    for path in sorted(calibrators.glob("*.json")) if calibrators.is_dir() else ():
        calibrator = load_calibrator(_text(path), file=str(path))
        named[calibrator.name] = calibrator
    loaded = load_policies([(str(path), _text(path)) for path in files], read=read)
    for policy in loaded.policies:
        _rehearse(policy)
    return Loaded(loaded, named)


def _rehearse(policy: Policy) -> None:
    """Run every check once: what is built or read at first use, telephone plans for one, must not hold up a request."""
    passage = Passage("choices[0].message.content", _REHEARSAL)
    exchange = Exchange("chat", {}, (Choice("choices[0]", texts=(passage,)),))
    for stage in policy.stages:
        run_stage(stage, exchange, lambda: 0.0)
    if effective_stream(policy) is StreamMode.WINDOW:
        delta = {"choices": [{"index": 0, "delta": {"content": _REHEARSAL}}]}
        event = sse.event(sse.encode(orjson.dumps(delta)))
        window = Window(policy)
        with suppress(ResponseBlocked):
            window.push(event.raw, event)
            window.finish()


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError([Problem(str(path), 1, 1, f"cannot be read: {error}")]) from error


def _reader(root: Path) -> Callable[[str], str]:
    def read(name: str) -> str:
        path = (root / name).resolve()
        if not path.is_relative_to(root):
            raise OSError(f"{name} is outside {root}")
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise OSError(f"{name} is larger than {_MAX_FILE_BYTES} bytes")
        return path.read_text("utf-8")

    return read


class PolicyFiles:
    """The policies in force. An edit takes effect within about a second; one with a mistake changes nothing and is logged."""

    def __init__(self, policies: Path, calibrators: Path) -> None:
        self._folders = (policies, calibrators)
        self._seen = self._fingerprint()
        self._loaded = load(policies, calibrators)

    @property
    def current(self) -> PolicySet:
        """The policies now in force."""
        return self._loaded.policies

    @property
    def calibrators(self) -> Mapping[str, Calibrator]:
        """The calibrators now in force, by name."""
        return self._loaded.calibrators

    async def watch(self) -> None:
        """Reload whenever a file changes, until cancelled."""
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                seen = await asyncio.to_thread(self._fingerprint)
                if seen == self._seen:
                    continue
                self._seen = seen
                self._loaded = await asyncio.to_thread(load, *self._folders)
                _log.info("policies_reloaded", policies=[p.label for p in self.current.policies])
            except (PolicyError, CalibrationError, OSError) as error:
                _log.error("policies_not_reloaded", problem=str(error))

    def _fingerprint(self) -> frozenset[tuple[str, int, int]]:
        root = self._folders[0].parent
        folders = {*self._folders, *(path for path in root.glob("schemas") if path.is_dir())}
        return frozenset(
            (str(path), (stat := path.stat()).st_mtime_ns, stat.st_size)
            for folder in folders
            if folder.is_dir()
            for path in folder.iterdir()
            if path.is_file()
        )
