"""Labels for calibrators: from files, every mistake with its line; and from the store."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import asdict

from gateway.calibrating.labels import read_labelled, reviewed
from gateway.labels import LabelError
from gateway.records import LabelSource, NewLabel, Verdict
from gateway.store import open_store
from policies import RiskTier, load_policy
from policies.labelled import Labelled
from tests.gateway.stores import NOW, a_decision, a_resolution, a_task, later, put

LINE: dict[str, Any] = {"id": "a", "acceptable": True, "signals": {"mean_logprob": -0.1}}


def written(folder: Path, *lines: Any) -> Path:
    path = folder / "labels.jsonl"
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return path


def test_every_field_of_a_labelled_response_can_be_written(tmp_path: Path) -> None:
    row = Labelled(
        id="a",
        acceptable=False,
        signals={"mean_logprob": -0.25, "judge.jury": 0.75},
        check_scores=(0.5, 1.0),
        model="gpt-4o",
        task="refunds",
        tier=RiskTier.HIGH,
        inclusion=0.15,
        weight=0.5,
        blind=True,
        at=NOW,
        digest="abc",
    )
    line = asdict(row) | {"at": NOW.isoformat(), "tier": "high", "signals": dict(row.signals)}
    assert read_labelled(written(tmp_path, line, "")) == [row]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("nonsense", "the line: Invalid JSON"),
        ("[1]", "the line: Input should be"),
        ({"id": "b", "signals": {}}, "acceptable: Field required"),
        (LINE | {"acceptable": "yes"}, "acceptable: Input should be a valid boolean"),
        (LINE | {"signals": {"meen_logprob": -0.1}}, "signals.meen_logprob"),
        ('{"id": "b", "acceptable": true, "signals": {"mean_logprob": NaN}}', "signals.mean"),
        (LINE | {"inclusion": 0.0}, "inclusion: Input should be greater than 0"),
        (LINE | {"tier": "huge"}, "tier: Input should be"),
        (LINE | {"at": "2030-01-01T00:00:00"}, "at: Input should have timezone info"),
        (LINE | {"extra": 1}, "extra: Extra inputs"),
        (LINE, "the id 'a' came before"),
        ("x" * 100_001, "longer than 100000 characters"),
    ],
    ids=str,
)
def test_a_mistake_is_told_with_its_line(tmp_path: Path, line: Any, says: str) -> None:
    path = written(tmp_path, LINE, "", line)
    with pytest.raises(LabelError) as caught:
        read_labelled(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert says in str(caught.value)


def test_all_mistakes_are_told_up_to_a_number(tmp_path: Path) -> None:
    with pytest.raises(LabelError) as caught:
        read_labelled(written(tmp_path, *["nonsense"] * 60))
    assert len(str(caught.value).splitlines()) == 51
    assert "and 10 mistakes more" in str(caught.value)


def test_an_empty_file_and_a_missing_one_are_said_to_be_so(tmp_path: Path) -> None:
    with pytest.raises(LabelError, match="there is no label in it"):
        read_labelled(written(tmp_path, ""))
    with pytest.raises(LabelError, match="cannot be read"):
        read_labelled(tmp_path / "nothing.jsonl")


POLICY = """\
policy: orders
confidence: {when_uncalibrated: hold}
stages:
  - name: rules
    checks:
      - {id: finished, use: finish_reason, on_fail: flag}
      - {id: short, use: length, max_chars: 100, on_fail: score}
"""


async def test_what_was_said_of_responses_comes_with_its_evidence_and_its_probability(
    tmp_path: Path,
) -> None:
    policy = load_policy(POLICY, file="p", read=lambda _: "")
    results = {
        "finished": {"score": 1.0},
        "short": {"score": 0.25},
    }
    evidence = {"signals": {"mean_logprob": -0.5, "n_tokens": 3}, "results": results}
    store = await open_store(f"sqlite:///{tmp_path}/h.db")
    recorded, task = await put(
        store,
        a_task(inclusion=0.2),
        policy=f"{policy.policy}@123",
        task_type="orders",
        detail={"evidence": evidence},
        inclusion=0.2,
        request_digest="r",
        response_digest="s",
    )
    await store.resolve(a_resolution(task, verdict=Verdict.REJECT))
    chosen = a_decision(policy="orders@123", detail={"evidence": evidence})
    await store.record(chosen)
    await store.label([NewLabel(chosen.id, NOW, LabelSource.FEEDBACK, "app", acceptable=True)])
    _, other = await put(store, a_task(), policy="orders2@1")
    await store.resolve(a_resolution(other))
    rows, unknown = await reviewed(store, policy)
    assert unknown == 1
    (row,) = rows
    assert row == Labelled(
        id=recorded.id,
        acceptable=False,
        signals={"mean_logprob": -0.5, "n_tokens": 3},
        check_scores=(0.25,),
        model=recorded.model,
        task="orders",
        tier=recorded.risk,
        inclusion=0.2,
        at=later(60),
        digest="rs",
    )
    assert await reviewed(store, policy, since=later(60)) == ([], 1 - 1)
    await store.close()
