"""Policies and calibrators from their folders, reloaded when a file changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec
import orjson

from gateway import logs, sse
from gateway.errors import ResponseBlocked
from gateway.spending import Prices
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
    is_calibrator,
    load_calibrator,
    load_policies,
    run_validators,
)
from policies.source import Source
from validators import Choice, Exchange, Passage

_POLL_S = 1.0
_REHEARSAL = "Call +1 212 555 0100, or write to ann@example.com about 4111 1111 1111 1111."
_MAX_FILE_BYTES = 4_000_000


class Loaded(msgspec.Struct, frozen=True):
    """What the folders held at one moment."""

    policies: PolicySet
    calibrators: Mapping[str, Calibrator]


def load(policies: Path, calibrators: Path, prices: Prices | None = None) -> Loaded:
    """The policies (`*.yaml`, in order of their names) and calibrators (`*.json`) of two folders.

    Files that policies name (schemas, rubrics) are looked up beside the policies folder, and nowhere else. With `prices`, a
    budget in US dollars for a judge whose price nobody knows is a problem too.

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
    read = reader(policies.parent.resolve())
    named = {}
    for path in sorted(calibrators.glob("*.json")) if calibrators.is_dir() else ():
        if is_calibrator(text := _text(path)):
            calibrator = load_calibrator(text, file=str(path))
            named[calibrator.name] = calibrator
    texts = [(str(path), _text(path)) for path in files]
    loaded = load_policies(texts, read=read)
    if prices is not None and (problems := list(_unpriced(loaded, texts, prices))):
        raise PolicyError(problems)
    for policy in loaded.policies:
        _rehearse(policy)
    return Loaded(loaded, named)


def _unpriced(
    loaded: PolicySet, texts: Sequence[tuple[str, str]], prices: Prices
) -> Iterator[Problem]:
    """The budgets that could not be kept, because a judge's price is not known."""
    for policy, (file, text) in zip(loaded.policies, texts, strict=True):
        for at, stage in enumerate(policy.stages):
            models = dict.fromkeys(model for judge in stage.judges for model in judge.models)
            # Asked for every judge, so that no request waits while a table of prices is read.
            unknown = [model for model in models if prices.of(model) is None]
            if unknown and stage.budget is not None and stage.budget.usd_per_day is not None:
                message = (
                    f"what {unknown[0]} costs is not known, so no budget can be kept: give `models` in "
                    "holdgate.yaml its `price`, or leave usd_per_day out"
                )
                place = ("stages", at, "budget", "usd_per_day")
                yield Source(text, file).problem(place, message)


def _rehearse(policy: Policy) -> None:
    """Run every check once: what is built or read at first use, telephone plans for one, must not hold up a request."""
    passage = Passage("choices[0].message.content", _REHEARSAL)
    exchange = Exchange("chat", {}, (Choice("choices[0]", texts=(passage,)),))
    for stage in policy.stages:
        run_validators(stage.validators, exchange, lambda: 0.0)
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


def reader(root: Path) -> Callable[[str], str]:
    """A way to read files in a folder by their names in it, of bounded size; others are an OSError."""

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

    def __init__(self, policies: Path, calibrators: Path, prices: Prices | None = None) -> None:
        self._folders = (policies, calibrators)
        self._prices = prices
        self._seen = self._fingerprint()
        self._loaded = load(policies, calibrators, prices)

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
                self._loaded = await asyncio.to_thread(load, *self._folders, self._prices)
                logs.info("policies_reloaded", policies=[p.label for p in self.current.policies])
            except (PolicyError, CalibrationError, OSError) as error:
                logs.error("policies_not_reloaded", problem=str(error))

    def _fingerprint(self) -> frozenset[tuple[str, int, int]]:
        root = self._folders[0].parent
        folders = {*self._folders, *(root / name for name in ("schemas", "rubrics"))}
        return frozenset(
            (str(path), (stat := path.stat()).st_mtime_ns, stat.st_size)
            for folder in folders
            if folder.is_dir()
            for path in folder.iterdir()
            if path.is_file()
        )
