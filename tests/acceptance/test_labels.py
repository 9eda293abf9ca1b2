"""What people and applications say of responses, and what becomes of it: feedback, files of labels, metrics, status."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.records import Role
from gateway.store import open_store
from tests.acceptance.acting import caller, make_keys, policy, request, scripted, until
from tests.acceptance.test_operations import holdgate, samples
from tests.conftest import GatewayFactory
from tests.processes import Server
from tests.services import new_sqlite

AUDITED = (
    "policy: audited\nmatch: {task: audited}\nmode: observe\n"
    "confidence: {source: none, when_uncalibrated: return}\n"
    "audit: {rate: 0.15, adaptive: {min: 0.05, max: 0.30}}\n"
)
POLICIES = {"1-audited": AUDITED, "2-held": policy("held", "hold: {wait: 0s}")}
PEOPLE = {"shop": Role.CLIENT, "mail": Role.CLIENT, "ann": Role.REVIEWER, "bob": Role.REVIEWER}


class World:
    """A gateway, and a caller for each of the people."""

    def __init__(
        self, server: Server, store_url: str, clients: dict[str, httpx.AsyncClient]
    ) -> None:
        self.server = server
        self.store_url = store_url
        self.clients = clients

    async def ask(self, who: str = "shop", task: str = "audited") -> tuple[str, str]:
        """The ids of the decision on an answer, and of the answer."""
        body = request("chat", task, scripted(text=f"Fine, {task}."))
        answer = await self.clients[who].post("/v1/chat/completions", json=body)
        assert answer.status_code in (200, 423)
        return answer.headers["x-holdgate-decision"], answer.json().get("id", "")

    async def feedback(self, who: str, **body: Any) -> httpx.Response:
        return await self.clients[who].post("/v1/feedback", json=body)

    async def opinion(self, who: str, decision: str, **body: Any) -> httpx.Response:
        return await self.clients[who].post(f"/decisions/{decision}/label", json=body)

    async def labels(self) -> list[Any]:
        store = await open_store(self.store_url)
        found = list(await store.labelled("", 100))
        await store.close()
        return found

    def holdgate(self, *arguments: str) -> str:
        return holdgate(self.server, *arguments)


@pytest.fixture
async def world(gateway: GatewayFactory, tmp_path: Path) -> AsyncIterator[World]:
    store_url = new_sqlite(tmp_path / "labels.db")
    keys = await make_keys(store_url, {**PEOPLE, "root": Role.ADMIN})
    server = gateway(POLICIES, store_url=store_url)
    async with AsyncExitStack() as stack:
        people = {
            name: await stack.enter_async_context(caller(server.url, key))
            for name, key in keys.items()
        }
        yield World(server, store_url, people)
    assert not server.tracebacks


async def test_an_application_says_what_it_thinks_of_its_own_responses(world: World) -> None:
    decision, answer = await world.ask()
    first = await world.feedback("shop", id=decision, acceptable=True)
    assert (first.status_code, first.json()) == (
        200,
        {"object": "feedback", "decision": decision, "acceptable": True, "stored": True},
    )
    again = await world.feedback("shop", id=answer, acceptable=True)
    assert (again.json()["decision"], again.json()["stored"]) == (decision, False)
    changed = await world.feedback("shop", id=answer, acceptable=False, comment="wrong price")
    assert changed.json()["stored"] is True
    (label,) = await world.labels()
    assert (label.acceptable, label.source, label.labeller) == (False, "feedback", "shop")
    assert (label.weight, label.inclusion) == (0.5, None)
    other = await world.feedback("mail", id=decision, acceptable=True)
    assert (other.status_code, other.json()["error"]["code"]) == (404, "not_found")
    reviewer = await world.feedback("ann", id=decision, acceptable=True)
    assert reviewer.status_code == 403


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"id": "hgd_x"}, "acceptable: Field required"),
        ({"id": "hgd_x", "acceptable": "yes"}, "acceptable: Input should be a valid boolean"),
        ({"id": "hgd_x", "acceptable": True, "score": 1}, "score: Extra inputs are not permitted"),
        ({"id": "x" * 300, "acceptable": True}, "id: String should have at most 256 characters"),
    ],
)
async def test_feedback_that_cannot_be_meant_is_refused(
    world: World, body: dict[str, Any], message: str
) -> None:
    answer = await world.feedback("shop", **body)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == message
    assert await world.labels() == []


async def test_the_official_client_gives_feedback(world: World) -> None:
    decision, answer = await world.ask()
    key = world.clients["shop"].headers["authorization"].removeprefix("Bearer ")

    def give() -> object:
        with openai.OpenAI(base_url=f"{world.server.url}/v1", api_key=key) as client:
            body = {"id": answer, "acceptable": True}
            return client.post("/feedback", body=body, cast_to=object)

    told = await asyncio.to_thread(give)
    assert told == {
        "object": "feedback",
        "decision": decision,
        "acceptable": True,
        "stored": True,
    }


async def test_reviewers_add_opinions_and_correct_them(world: World) -> None:
    decision, _ = await world.ask()
    for who in ("ann", "bob"):
        told = await world.opinion(who, decision, acceptable=False)
        assert told.json() == {
            "object": "label",
            "decision": decision,
            "acceptable": False,
            "stored": True,
        }
    assert (await world.opinion("bob", decision, acceptable=True)).json()["stored"] is True
    (label,) = await world.labels()
    assert (label.acceptable, label.weight, label.labels) == (False, 1.0, 2)
    assert (await world.opinion("shop", decision, acceptable=True)).status_code == 403
    assert (await world.opinion("ann", "hgd_none", acceptable=True)).status_code == 404
    assert (await world.opinion("ann", decision, acceptable="no")).status_code == 400
    shown = (await world.clients["root"].get("/admin/metrics")).json()
    assert shown["all"]["reviewer_agreement"] == 0.0
    assert shown["all"]["reviewer_pairs"] == 1


async def test_a_second_opinion_is_blind_and_somebody_elses(world: World) -> None:
    """What ann rejected comes into bob's queue, without her verdict and without reasons; ann cannot take it."""
    decision, _ = await world.ask(task="held")
    ann, bob = world.clients["ann"], world.clients["bob"]

    async def queue(who: httpx.AsyncClient) -> list[Any]:
        found: list[Any] = (await who.get("/review/queue")).json()["data"]
        return found

    (first,) = await queue(ann)
    body = {"verdict": "reject", "reason": "tone"}
    assert (await ann.post(f"/review/{first['id']}/submit", json=body)).is_success
    store = await open_store(world.store_url)
    assert (await store.ask_again({decision: "hgt_again"}, datetime.now(UTC))).opened == 1
    await store.close()
    assert await queue(ann) == []
    (task,) = await queue(bob)
    assert (task["id"], task["kind"], task["decision_id"]) == (
        "hgt_again",
        "second_opinion",
        decision,
    )
    shown = (await bob.get("/review/hgt_again")).json()
    assert shown["passages"][0]["text"] == "Fine, held."
    assert (shown["confidence"], shown["decision"], shown["verdict"]) == (None, None, None)
    assert "tone" not in str(shown)
    elsewhere = (await bob.get(f"/decisions/{decision}")).json()
    assert (elsewhere["confidence"], elsewhere["review"], elsewhere["reasons"]) == (None, None, [])
    assert "detail" not in elsewhere
    assert "detail" in (await world.clients["root"].get(f"/decisions/{decision}")).json()
    refused = await ann.post("/review/hgt_again/claim")
    assert refused.status_code == 409
    assert "you have judged this response before" in refused.json()["error"]["message"]
    assert (await bob.post("/review/hgt_again/claim")).is_success
    done = await bob.post("/review/hgt_again/submit", json={"verdict": "approve"})
    assert (done.status_code, done.json()["verdict"]) == (200, "approve")
    (label,) = await world.labels()
    assert (label.acceptable, label.settled, label.labels, label.weight) == (False, False, 2, 1.0)
    # What the caller was told stays: the first decision stands.
    gone = await world.clients["shop"].get(f"/v1/chat/completions/{decision}")
    assert (gone.status_code, gone.json()["error"]["code"]) == (403, "response_rejected")
    assert (await bob.get(f"/decisions/{decision}")).json()["review"]["verdict"] == "reject"


async def test_a_file_of_labels_is_imported_whole_or_not_at_all(
    world: World, tmp_path: Path
) -> None:
    (first, _), (second, answer) = await world.ask(), await world.ask()
    good = [
        {"id": first, "acceptable": True, "labeller": "eve", "inclusion": 0.25},
        {"id": answer, "acceptable": False, "weight": 0.5, "blind": True},
    ]
    path = tmp_path / "labels.jsonl"
    path.write_text("\n".join(map(json.dumps, [*good, {"id": "hgd_none", "acceptable": True}])))
    with pytest.raises(subprocess.CalledProcessError) as refused:
        await asyncio.to_thread(world.holdgate, "labels", "import", str(path))
    assert f"{path}:3: there is no decision hgd_none" in refused.value.stderr
    path.write_text('{"id": "a"}\n\n{"id": "b", "acceptable": true, "weight": 2}\nno\n')
    with pytest.raises(subprocess.CalledProcessError) as refused:
        await asyncio.to_thread(world.holdgate, "labels", "import", str(path))
    lines = refused.value.stderr.strip().splitlines()
    assert [line.rsplit("labels.jsonl")[1][:3] for line in lines] == [":1:", ":3:", ":4:"]
    assert await world.labels() == []
    path.write_text("\n".join(map(json.dumps, good)))
    said = await asyncio.to_thread(world.holdgate, "labels", "import", str(path))
    assert said == "2 new labels, 0 known already\n"
    said = await asyncio.to_thread(world.holdgate, "labels", "import", str(path))
    assert said == "0 new labels, 2 known already\n"
    found = {each.decision.id: each for each in await world.labels()}
    assert (found[first].labeller, found[first].inclusion) == ("eve", 0.25)
    assert (found[second].labeller, found[second].blind) == ("import", True)


async def test_an_observing_policy_that_adapts_is_audited_in_full_and_told_of(
    world: World,
) -> None:
    decisions = [(await world.ask())[0] for _ in range(4)]
    await world.ask(task="held")
    tasks = (await world.clients["ann"].get("/review/queue")).json()["data"]
    audits = [task for task in tasks if task["kind"] == "audit"]
    assert {task["decision_id"] for task in audits} == set(decisions)
    for task, verdict in zip(audits, ("approve", "approve", "reject"), strict=False):
        url = f"/review/{task['id']}/submit"
        assert (await world.clients["ann"].post(url, json={"verdict": verdict})).is_success
    shown = (await world.clients["root"].get("/admin/metrics", params={"since": "1h"})).json()
    audited, held = shown["policies"]["audited"], shown["policies"]["held"]
    assert (audited["decisions"], held["decisions"]) == (4, 1)
    assert (audited["auto_resolve_rate"], held["escalation_rate"]) == (1.0, 1.0)
    escape = audited["error_escape"]
    assert (escape["estimate"], escape["reviewed"]) == (pytest.approx(1 / 3), 3)
    assert escape["low"] < 1 / 3 < escape["high"]
    assert shown["all"]["review_p50_s"] is not None
    assert shown["targets"]["error_escape"] == "below 0.02"
    for who in ("shop", "ann"):
        assert (await world.clients[who].get("/admin/metrics")).status_code == 403
    status = await asyncio.to_thread(world.holdgate, "status")
    words = " ".join(status.split())
    assert "audited (observe) stage: observing, collecting labels" in words
    assert "labels: 3, of which 1 not acceptable; to fit a calibrator: 197 more labels" in words
    assert "audits: tightened, 100% of what is returned" in words
    assert "metrics: 4 decisions, escalation 0.0%, auto-resolve 100.0%, error escape 33.3%" in words
    ready = (await world.clients["ann"].get("/readyz")).json()
    assert ready["alarms"] == []


async def test_the_metrics_are_there_for_prometheus(world: World) -> None:
    await world.ask()

    async def found() -> float | None:
        labels = frozenset({("policy", "audited"), ("metric", "auto_resolve_rate")})
        return (await samples(world.clients["root"])).get(("holdgate_quality", labels))

    assert await until(found, within_s=40) == 1.0


async def test_nothing_is_resumed_that_is_not_known(world: World) -> None:
    with pytest.raises(subprocess.CalledProcessError) as refused:
        await asyncio.to_thread(world.holdgate, "calibrate", "resume", "nobody")
    assert "nothing is known of a policy 'nobody'" in refused.value.stderr
