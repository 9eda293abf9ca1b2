"""What judges spend: budgets that hold across restarts and replicas, verdicts shared through Redis, and the economics."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.spending import REFRESH_S
from tests.acceptance.test_judges import ask, counted, judge, judged, result_of
from tests.conftest import GatewayFactory, UpstreamCalls
from tests.processes import Server, write_config
from tests.services import Postgres, Redis

OpenAIClient = Callable[..., openai.OpenAI]

#: A verdict on 1,000 tokens costs one dollar.
PRICE = {"input_usd_per_million_tokens": 1000.0, "output_usd_per_million_tokens": 0.0}
DOLLAR = {"*": {"usage": {"prompt_tokens": 1000, "completion_tokens": 9}}}
#: And on one token a tenth of a cent.
MILL = {"*": {"usage": {"prompt_tokens": 1, "completion_tokens": 9}}}
#: Enough for three verdicts; the fourth is thought to cost about 80 cents.
BUDGET = {"usd_per_day": 3.5, "latency": "10s"}


def settings(upstream: Server) -> dict[str, Any]:
    models = [{"match": "*", "base_url": f"{upstream.url}/v1", "price": PRICE}]
    return {"models": models, "review": {"usd_per_minute": 1.5}}


def spend(client: openai.OpenAI, what: str, judges: dict[str, Any]) -> tuple[str, str]:
    """What becomes of an answer: what the client gets, and the cause if there is no verdict."""
    got, decision = ask(client, f"Answer {what}.", judges)
    return got, str(result_of(decision)["cause"])


def spend_a_dollar(client: openai.OpenAI, what: str) -> tuple[str, str]:
    """What becomes of an answer whose verdict costs a dollar."""
    return spend(client, what, DOLLAR)


SPENT = ("response_held", "budget")


def test_a_budget_used_up_stays_so_after_a_restart_and_the_decision_says_so(
    gateway: GatewayFactory, openai_client: OpenAIClient, upstream: Server
) -> None:
    policies = {"frugal": judged("frugal", match={}, budget=BUDGET)}
    server = gateway(policies, **settings(upstream))
    client = openai_client(server.url)
    found = [spend_a_dollar(client, f"number {number}") for number in range(4)]
    assert found == 3 * [("answered", "None")] + [SPENT]
    server.restart()
    got, decision = ask(client, "Once more.", DOLLAR)
    assert (got, result_of(decision)["cause"]) == SPENT
    assert "the budget is used up" in json.dumps(decision["detail"]["decision"]["reasons"])
    server.kill()
    server.start()
    assert spend_a_dollar(client, "after a crash") == SPENT
    failures = counted(server, "holdgate_judge_failures_total", judge="sound", cause="budget")
    assert failures == 1


@pytest.mark.parametrize(
    ("when_used_up", "got"),
    [("return", "answered"), ("block", "response_blocked"), ("hold", "response_held")],
)
def test_the_policy_says_what_happens_when_its_budget_is_used_up(
    gateway: GatewayFactory,
    openai_client: OpenAIClient,
    upstream: Server,
    when_used_up: str,
    got: str,
) -> None:
    budget = {"usd_per_day": 0.01, "when_used_up": when_used_up}
    policies = {"poor": judged("poor", judge(on_error="flag"), match={}, budget=budget)}
    server = gateway(policies, **settings(upstream))
    assert spend_a_dollar(openai_client(server.url), "with nothing") == (got, "budget")


def test_many_at_once_cannot_overspend(
    gateway: GatewayFactory,
    openai_client: OpenAIClient,
    upstream: Server,
    upstream_calls: UpstreamCalls,
) -> None:
    policies = {"frugal": judged("frugal", match={}, budget=BUDGET)}
    client = openai_client(gateway(policies, **settings(upstream)).url)
    slow = {"*": {**DOLLAR["*"], "delay_ms": 1500}}
    found: list[str] = []

    def one(number: int) -> None:
        _, decision = ask(client, f"At once {number}.", slow)
        found.append(str(result_of(decision)["cause"]))

    threads = [threading.Thread(target=one, args=[number]) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # What was set aside for each is less than the dollar it came to: five times about 67 cents.
    assert 3 <= found.count("None") <= 5
    assert found.count("None") + found.count("budget") == 8


def test_replicas_on_one_database_share_a_budget(
    gateway: GatewayFactory, openai_client: OpenAIClient, upstream: Server, postgres: Postgres
) -> None:
    policies = {"frugal": judged("frugal", match={}, budget=BUDGET)}
    url = postgres.new_database()
    first, second = (
        openai_client(gateway(policies, name=name, store_url=url, **settings(upstream)).url)
        for name in ("first", "second")
    )
    for number in range(3):
        assert spend_a_dollar(first, f"number {number}") == ("answered", "None")
    # What these cost together is far from the budget: only what the other replica has spent can end it.
    until_s = time.monotonic() + 5 * REFRESH_S
    found = ("answered", "None")
    while found != SPENT and time.monotonic() < until_s:
        found = spend(second, f"at {time.monotonic()}", MILL)
    assert found == SPENT


def test_a_budget_for_a_judge_without_a_price_is_refused(upstream: Server, tmp_path: Path) -> None:
    config = write_config(
        tmp_path, upstream_url=upstream.url, policies={"blind": judged("blind", budget=BUDGET)}
    )
    for command in (["serve"], ["policy", "lint"]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "gateway.cli", *command, "--config", str(config)],
            capture_output=True,
            text=True,
            check=False,
            timeout=50,
        )
        assert done.returncode == 1
        assert f"{tmp_path}/policies/blind.yaml:1:" in done.stderr
        assert "what judge-1 costs is not known" in done.stderr


def test_a_verdict_without_a_price_is_recorded_as_of_unknown_cost(
    gateway: GatewayFactory, openai_client: OpenAIClient
) -> None:
    server = gateway({"judged": judged("judged", match={})})
    _, decision = ask(openai_client(server.url), "For nobody knows what.", {"*": {}})
    result = result_of(decision)
    assert (result["outcome"], result["cost_usd"]) == ("pass", None)
    layers = httpx.get(f"{server.url}/admin/economics").json()["layers"]
    assert (layers[1]["requests"], layers[1]["unknown"], layers[1]["usd"]) == (1, 1, 0.0)


def test_a_listed_model_has_litellms_price_without_litellm(
    gateway: GatewayFactory, openai_client: OpenAIClient
) -> None:
    check = judge(model="gpt-4o-mini")
    server = gateway({"judged": judged("judged", check, match={}, budget=BUDGET)})
    usage = {"prompt_tokens": 1_000_000, "completion_tokens": 0}
    _, decision = ask(openai_client(server.url), "Listed.", {"*": {"usage": usage}})
    assert result_of(decision)["cost_usd"] == pytest.approx(0.15)


def test_replicas_share_verdicts_through_redis_and_ask_again_without_it(
    gateway: GatewayFactory,
    openai_client: OpenAIClient,
    upstream: Server,
    redis_server: Redis,
) -> None:
    policies = {"judged": judged("judged", match={})}
    first, second = (
        openai_client(
            gateway(policies, name=name, redis_url=redis_server.url, **settings(upstream)).url
        )
        for name in ("first", "second")
    )
    shared = [result_of(ask(each, "Said to one.", DOLLAR)[1]) for each in (first, second)]
    assert [each["cached"] for each in shared] == [False, True]
    assert [each["opinion"]["rationale"] != "" for each in shared] == [True, False]
    redis_server.kill()
    try:
        alone = [result_of(ask(each, "Said to both.", DOLLAR)[1]) for each in (first, second)]
        assert [(each["outcome"], each["cached"]) for each in alone] == 2 * [("pass", False)]
        again = result_of(ask(second, "Said to one.", DOLLAR)[1])
        assert again["cached"]
    finally:
        redis_server.start()


def test_the_economics_tell_layers_apart_and_survive_a_restart(
    gateway: GatewayFactory, openai_client: OpenAIClient, upstream: Server, tmp_path: Path
) -> None:
    rules = json.dumps(
        {
            "policy": "rules",
            "confidence": {"source": "none", "when_uncalibrated": "return"},
            "stages": [{"name": "rules", "checks": [{"id": "secrets", "use": "secrets"}]}],
        }
    )
    policies = {"a": judged("judged", match={"task": "judged"}), "b": rules}
    server = gateway(policies, **settings(upstream))
    client = openai_client(server.url)
    to_judge = {"x-holdgate-task": "judged"}
    for number in range(3):
        ask(client, f"Only rules {number}.", {})
    ask(client, "Judged.", DOLLAR, extra_headers=to_judge)
    _, held = ask(client, "Held.", {"*": {"text": "Hm."}}, extra_headers=to_judge)
    task = f"{server.url}/review/{held['review']['id']}"
    claimed_s = time.monotonic()
    httpx.post(f"{task}/claim").raise_for_status()
    httpx.post(f"{task}/submit", json={"verdict": "approve"}).raise_for_status()
    worked_s = time.monotonic() - claimed_s
    before = httpx.get(f"{server.url}/admin/economics", params={"since": "1h"}).json()
    server.restart()
    since = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    after = httpx.get(f"{server.url}/admin/economics", params={"since": since}).json()
    assert after["layers"] == before["layers"]
    by_name = {each["layer"]: each for each in after["layers"]}
    assert after["decisions"] == by_name["rules"]["requests"] == 5
    assert (by_name["judge"]["requests"], by_name["judge"]["share"]) == (2, 0.4)
    assert 1.0 < by_name["judge"]["usd"] < 2.5
    assert by_name["judge"]["latency_p95_ms"] > by_name["rules"]["latency_p95_ms"] > 0
    assert (by_name["person"]["requests"], by_name["person"]["unknown"]) == (1, 0)
    assert by_name["person"]["usd"] == pytest.approx(1.5 * after["person_minutes"])
    assert 0 < after["person_minutes"] * 60 < worked_s
    assert by_name["person"]["latency_p50_ms"] > after["person_minutes"] * 60_000
    config = str(tmp_path / "gateway" / "holdgate.yaml")
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "gateway.cli", "economics", "--config", config],
        cwd=tmp_path / "gateway",
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    )
    assert "40.0%" in shown.stdout
    wrong = httpx.get(f"{server.url}/admin/economics", params={"since": "yesterday"})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "since")
