"""Policies and calibrators from their folders, and what an edit does."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from gateway import policy_files
from gateway.policy_files import PolicyFiles, load
from policies import CalibrationError, PolicyError

CONFIG = Path(__file__).parents[2] / "config"
POLICY = "policy: {}\nconfidence: {{source: none, when_uncalibrated: return}}\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with one policy, `first`, and a schema."""
    for name in ("policies", "calibrators", "schemas"):
        (tmp_path / name).mkdir()
    write(tmp_path / "policies" / "10-first.yaml", POLICY.format("first"))
    write(tmp_path / "schemas" / "a.json", '{"type": "object"}')
    return tmp_path


def write(path: Path, text: str) -> None:
    """Write a file as editors do: whole, and in one step."""
    path.with_name(".new").write_text(text, "utf-8")
    path.with_name(".new").replace(path)


def names(root: Path) -> list[str]:
    loaded = load(root / "policies", root / "calibrators")
    return [policy.policy for policy in loaded.policies.policies]


def with_schema(path: str) -> str:
    check = f"{{id: shape, use: json_schema, schema: {path}, on_fail: flag}}"
    return POLICY.format("first") + f"stages: [{{name: rules, checks: [{check}]}}]\n"


# -------------------------------------------------------------------------------------------------- loading


def test_policies_are_in_the_order_of_their_files(root: Path) -> None:
    write(root / "policies" / "20-last.yml", POLICY.format("last"))
    write(root / "policies" / "05-zero.yaml", POLICY.format("zero"))
    assert names(root) == ["zero", "first", "last"]


def test_files_that_are_no_policies_are_passed_over(root: Path) -> None:
    folder = root / "policies"
    write(folder / "notes.txt", "policy: [")
    write(folder / "first.yaml~", "policy: [")
    write(folder / ".hidden.yaml", "policy: [")
    (folder / ".#10-first.yaml").symlink_to("ann@host.1234")
    assert names(root) == ["first"]


def test_there_may_be_no_calibrators(root: Path) -> None:
    (root / "calibrators").rmdir()
    assert load(root / "policies", root / "calibrators").calibrators == {}


def test_thresholds_of_judges_lie_beside_calibrators(root: Path) -> None:
    write(root / "calibrators" / "correct.json", '{"target_agreement": 0.85, "judges": []}')
    assert load(root / "policies", root / "calibrators").calibrators == {}


def test_a_folder_that_is_not_there_is_named_with_the_setting_to_mend(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="no such folder; `policies` in"):
        load(tmp_path / "nowhere", tmp_path)


def test_every_problem_of_every_file_is_told_with_its_place(root: Path) -> None:
    write(root / "policies" / "20-b.yaml", "policy: b\n" + "risc: {base: low}\n")
    write(root / "policies" / "30-c.yaml", POLICY.format("first"))
    with pytest.raises(PolicyError) as caught:
        names(root)
    told = str(caught.value)
    assert f"{root / 'policies' / '20-b.yaml'}:2:1" in told
    assert f"{root / 'policies' / '30-c.yaml'}:1:9" in told


@pytest.mark.parametrize("kind", ["not text", "a folder", "a dead link"])
def test_a_policy_that_cannot_be_read_is_named(root: Path, kind: str) -> None:
    path = root / "policies" / "20-odd.yaml"
    match kind:
        case "not text":
            path.write_bytes(b"policy: \xff")
        case "a folder":
            path.mkdir()
        case _:
            path.symlink_to(root / "nowhere")
    with pytest.raises(PolicyError, match=r"20-odd\.yaml:1:1: cannot be read"):
        names(root)


def test_a_calibrator_that_makes_no_sense_is_named(root: Path) -> None:
    write(root / "calibrators" / "odd.json", "{}")
    with pytest.raises(CalibrationError, match=r"odd\.json"):
        load(root / "policies", root / "calibrators")


def test_the_starter_calibrator_goes_by_its_name() -> None:
    assert set(load(CONFIG / "policies", CONFIG / "calibrators").calibrators) == {"demo"}


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("schemas/a.json", None),
        ("schemas/../schemas/a.json", None),
        ("../secret.json", "outside"),
        ("/etc/hostname", "outside"),
        ("schemas/link.json", "outside"),
        ("schemas/none.json", "No such file"),
        ("schemas", "Is a directory"),
        ("schemas/large.json", "larger than"),
    ],
)
def test_files_a_policy_names_are_read_beside_its_folder_only(
    root: Path, path: str, problem: str | None
) -> None:
    write(root.parent / "secret.json", "{}")
    (root / "schemas" / "link.json").symlink_to(root.parent / "secret.json")
    with (root / "schemas" / "large.json").open("wb") as large:
        large.truncate(5_000_000)
    write(root / "policies" / "10-first.yaml", with_schema(path))
    if problem is None:
        assert names(root) == ["first"]
    else:
        with pytest.raises(PolicyError, match=problem):
            names(root)


# ------------------------------------------------------------------------------------------------- reloading


class Watched(logging.Handler):
    """Policies whose folders are watched, and what was logged of them."""

    def __init__(self, files: PolicyFiles) -> None:
        super().__init__()
        self.files = files
        self.logged: list[dict[str, Any]] = []
        self._told = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Note down what is logged."""
        self.logged.append({"event": record.getMessage(), **vars(record)["fields"]})
        self._told.set()

    @property
    def names(self) -> list[str]:
        return [policy.policy for policy in self.files.current.policies]

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds of what was logged or loaded."""
        async with asyncio.timeout(20):
            while not holds():
                self._told.clear()
                await self._told.wait()

    async def until_refused(self) -> str:
        """Wait until an edit was refused, and say why."""
        await self.until(lambda: any(e["event"] == "policies_not_reloaded" for e in self.logged))
        return str(self.logged[-1]["problem"])


@asynccontextmanager
async def watched(root: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    monkeypatch.setattr(policy_files, "_POLL_S", 0.01)
    seen = Watched(PolicyFiles(root / "policies", root / "calibrators"))
    logger = logging.getLogger("holdgate")
    logger.setLevel(logging.INFO)
    logger.addHandler(seen)
    watching = asyncio.create_task(seen.files.watch())
    try:
        yield seen
        assert not watching.done(), watching
    finally:
        watching.cancel()
        logger.removeHandler(seen)
        logger.setLevel(logging.NOTSET)


async def test_an_edit_takes_effect(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(root, monkeypatch) as seen:
        before = seen.files.current
        write(root / "policies" / "20-second.yaml", POLICY.format("second"))
        await seen.until(lambda: seen.names == ["first", "second"])
        assert [policy.policy for policy in before.policies] == ["first"]
        (root / "policies" / "10-first.yaml").unlink()
        await seen.until(lambda: seen.names == ["second"])


async def test_an_edit_of_a_schema_takes_effect(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "policies" / "10-first.yaml", with_schema("schemas/a.json"))
    async with watched(root, monkeypatch) as seen:
        digest = seen.files.current.policies[0].digest
        write(root / "schemas" / "a.json", '{"type": "array"}')
        await seen.until(lambda: seen.files.current.policies[0].digest != digest)


async def test_a_new_calibrator_takes_effect(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with watched(root, monkeypatch) as seen:
        shutil.copy(CONFIG / "calibrators" / "demo.json", root / "calibrators" / "demo.json")
        await seen.until(lambda: set(seen.files.calibrators) == {"demo"})


async def test_an_edit_with_a_mistake_changes_nothing_until_it_is_mended(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(root, monkeypatch) as seen:
        path = root / "policies" / "10-first.yaml"
        write(path, POLICY.format("first") + "risc: {}\n")
        assert f"{path}:3:1" in await seen.until_refused()
        assert seen.names == ["first"]
        write(path, POLICY.format("mended"))
        await seen.until(lambda: seen.names == ["mended"])


async def test_a_folder_that_goes_away_for_a_while_changes_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with watched(root, monkeypatch) as seen:
        (root / "policies").rename(root / "away")
        assert "no such folder" in await seen.until_refused()
        assert seen.names == ["first"]
        write(root / "away" / "20-second.yaml", POLICY.format("second"))
        (root / "away").rename(root / "policies")
        await seen.until(lambda: seen.names == ["first", "second"])


async def test_files_that_come_and_go_do_not_end_the_watch(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file may go away between being listed and being looked at."""

    def churn() -> None:
        for _ in range(3_000):
            path = root / "policies" / ".swap"
            path.touch()
            path.unlink()

    async with watched(root, monkeypatch) as seen:
        monkeypatch.setattr(policy_files, "_POLL_S", 0)
        await asyncio.to_thread(churn)
        write(root / "policies" / "20-second.yaml", POLICY.format("second"))
        await seen.until(lambda: seen.names == ["first", "second"])
