"""`holdgate calibrate renew`: what is due and nothing else, proposed or brought into force, while nobody looks."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from gateway import terminal
from gateway.audits import artefact_of
from gateway.cli import app
from gateway.records import Alarm, LabelSource, NewLabel, Standing
from gateway.store import SqlStore, open_store
from policies import AuditLevel, RiskTier, load_calibrator
from tests.gateway.calibrating.desk import Desk, some_labels
from tests.gateway.stores import a_decision


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A policy whose calibrator is in force with a certificate of 10 %."""
    for console in (terminal.out, terminal.err):
        monkeypatch.setattr(console, "width", 200)
    desk = Desk(tmp_path)
    desk.labels(some_labels(800, seed=1))
    assert desk.fit("orders-1.json", "--alpha", "0.1").exit_code == 0
    done = desk.run("apply", desk.path("orders-1.json"), "--policy", "orders", "--yes")
    assert done.exit_code == 0, done.output
    return desk


def better(p: float) -> float:
    """What the calibrator in force does not know: the surer are right more often, the others less."""
    return p**3 + 0.02 * (1 - p)


def review(desk: Desk, count: int, chance: Callable[[float], float] = better) -> None:
    """Record responses, and what ann says of them."""

    async def act(store: SqlStore) -> None:
        now, given = datetime.now(UTC), []
        async with asyncio.TaskGroup() as group:
            for row in some_labels(count, seed=5, chance=chance):
                decision = a_decision(
                    id=f"hgd_{row['id']}_{now.timestamp()}",
                    created_at=now,
                    policy="orders@1",
                    model="m",
                    task_type="orders",
                    risk=RiskTier.MEDIUM,
                    detail={"evidence": {"signals": row["signals"], "results": {}}},
                    request_digest=f"{row['id']} {now}",
                )
                group.create_task(store.record(decision))
                said = NewLabel(decision.id, now, LabelSource.REVIEW, "ann", row["acceptable"])
                given.append(replace(said, inclusion=1.0))
        await store.label(given)

    asyncio.run(with_store(desk, act))


async def with_store(desk: Desk, act: Callable[[SqlStore], Any]) -> None:
    store = await open_store(desk.store_url)
    await act(store)
    await store.close()


def proposals(desk: Desk, kind: str) -> list[Path]:
    return sorted((desk.folder / "proposals" / "orders").glob(f"*.{kind}"))


def status(desk: Desk) -> str:
    result = CliRunner().invoke(app, ["status", "--config", str(desk.config)])
    assert result.exit_code == 0, result.output
    return result.output


def test_enough_new_labels_make_a_proposal_that_status_names_and_only_once(desk: Desk) -> None:
    before = desk.policy.read_text()
    review(desk, 600)
    assert "proposed:" not in status(desk)
    result = desk.run("renew")
    assert result.exit_code == 0, result.output
    assert "orders: 600 new labels" in result.stdout
    assert "Proposed: log loss" in result.stdout
    (path,) = proposals(desk, "json")
    assert desk.policy.read_text() == before
    said = f"`holdgate calibrate apply {path} --policy orders`"
    assert said in status(desk).replace("\n", " ").replace("  ", " ")
    again = desk.run("renew")
    assert (again.exit_code, again.output) == (0, "")
    assert proposals(desk, "json") == [path]
    whole = path.read_text()
    path.write_text(whole[:100])
    assert f"the proposal {path} cannot be read" in status(desk).replace("\n", " ").replace(
        "  ", " "
    )
    path.write_text(whole)
    assert desk.run("apply", str(path), "--policy", "orders", "--yes").exit_code == 0
    assert "proposed:" not in status(desk)


def test_what_is_better_comes_into_force_if_that_is_wanted(desk: Desk) -> None:
    review(desk, 600)
    result = desk.run("renew", "--policy", "orders", "--apply")
    assert result.exit_code == 0, result.output
    (path,) = proposals(desk, "json")
    assert f"calibrator: {path.stem}" in desk.policy.read_text()
    assert desk.run("rollback", "orders").exit_code == 0


def test_what_is_no_better_is_not_proposed_and_not_tried_again_with_the_same_labels(
    desk: Desk,
) -> None:
    review(desk, 600, chance=lambda p: p / 2)
    result = desk.run("renew", "--apply")
    assert result.exit_code == 0
    assert "Not proposed: " in result.stderr
    assert (len(proposals(desk, "json")), len(proposals(desk, "html"))) == (0, 1)
    assert "orders-1" in desk.policy.read_text()
    assert desk.run("renew", "--apply").output == ""


def test_few_labels_are_enough_only_after_an_alarm(desk: Desk) -> None:
    review(desk, 240)
    assert desk.run("renew").output == ""
    path = desk.folder / "calibrators" / "orders-1.json"
    artefact = artefact_of(load_calibrator(path.read_text(), file=str(path)))

    async def suspend(store: SqlStore) -> None:
        now, level = datetime.now(UTC), AuditLevel.TIGHTENED
        why = "the distribution of confidence has changed"
        assert await store.put_standing(Standing("orders", 1, now, level, why, artefact))

    asyncio.run(with_store(desk, suspend))
    result = desk.run("renew")
    said = "orders: 240 new labels; suspended: the distribution of confidence has changed"
    assert said in result.stdout


def test_while_reviewers_do_not_agree_nothing_is_fitted_to_what_they_say(desk: Desk) -> None:
    review(desk, 600)

    async def disagree(store: SqlStore) -> None:
        now = datetime.now(UTC)
        alarm = Alarm("hga_1", now, "orders", "reviewers", "reviewers do not agree", {})
        assert await store.put_standing(Standing("orders", 1, now, "tightened"), [alarm])

    asyncio.run(with_store(desk, disagree))
    result = desk.run("renew", "--apply")
    assert result.exit_code == 0
    assert "Not proposed: reviewers do not agree." in result.stderr
    assert proposals(desk, "html") == []
    assert "orders-1" in desk.policy.read_text()


def test_it_stays_and_brings_into_force_what_comes_later(desk: Desk) -> None:
    command = [sys.executable, "-u", "-m", "gateway.cli", "calibrate", "renew", "--every", "1s"]
    command += ["--apply", "--config", str(desk.config)]
    text = desk.policy.read_text()
    desk.policy.write_text(text.replace("policy: orders", "policy: [", 1))
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            assert process.stdout is not None
            broken = next(line for line in process.stdout if "orders.yaml" in line)
            desk.policy.write_text(text)
            review(desk, 600)
            told = (
                line for line in process.stdout if line.startswith(("Applied.", "Not proposed"))
            )
            applied = next(told, "it ended")
        finally:
            process.terminate()
        process.communicate(timeout=30)
    assert "orders.yaml:" in broken
    assert applied.startswith("Applied.")
    (path,) = proposals(desk, "json")
    assert f"calibrator: {path.stem}" in desk.policy.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--policy", "nothing"), "there is no policy 'nothing'; there are orders"),
        (("--every", "soon"), "--every soon: "),
        (("--every", "10ms"), "no more often than every second"),
    ],
)
def test_what_is_wrong_is_told(desk: Desk, arguments: tuple[str, ...], says: str) -> None:
    result = desk.run("renew", *arguments)
    assert result.exit_code == 1
    assert says in result.stderr


def test_a_folder_that_cannot_be_made_is_told(desk: Desk) -> None:
    review(desk, 600)
    (desk.folder / "proposals").write_text("in the way")
    result = desk.run("renew")
    assert result.exit_code == 1
    assert "cannot be made" in result.stderr


def test_a_policy_without_a_certificate_is_left_alone(tmp_path: Path) -> None:
    result = Desk(tmp_path).run("renew")
    assert (result.exit_code, result.output) == (0, "")
