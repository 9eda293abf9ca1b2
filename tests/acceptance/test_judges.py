"""Judges end to end: the demo upstream plays the model and its judges, well and badly, and clients use the official SDK."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.breaker import FAILURES
from gateway.settings import PACKAGED_CONFIG
from tests.acceptance.acting import scripted
from tests.acceptance.conftest import ClientFor
from tests.conftest import GatewayFactory, UpstreamCalls
from tests.processes import Server, start_gateway, write_config

RUBRIC = {
    "name": "sound",
    "description": "Say whether the answer is right.",
    "context": ["question"],
    "criteria": [{"id": "ok", "question": "Is the answer right?"}],
}
PRICE = {"input_usd_per_million_tokens": 1.0, "output_usd_per_million_tokens": 10.0}


def judge(**fields: Any) -> dict[str, Any]:
    """A check that asks a model whether the answer is right."""
    base = {"id": "sound", "use": "rubric", "rubric": RUBRIC, "model": "judge-1"}
    return {**base, "on_fail": "block", "on_error": "hold", **fields}


def judged(task: str, *checks: dict[str, Any], budget: Any = None, **more: Any) -> str:
    """A policy for one task with one stage of judges that returns what they do not object to."""
    stage: dict[str, Any] = {"name": "judge", "checks": checks or [judge()]}
    if budget is not None:
        stage["budget"] = budget
    document = {
        "policy": task,
        "match": {"task": task},
        "risk": {"base": "low"},
        "stages": [stage],
        "confidence": {"source": "none", "when_uncalibrated": "return"},
        "hold": {"wait": "0s"},
    }
    return json.dumps({**document, **more})


LATENCY = {"latency": "800ms"}
POLICIES = {
    "judged": judged("judged"),
    "no-logprobs": judged("no-logprobs", judge(model="no-logprobs-judge")),
    "no-schema": judged("no-schema", judge(model="no-schema-judge")),
    "digest": judged("digest", content="digest"),
    "redacted": judged("redacted", content="redacted"),
    **{f"on-{action}": judged(f"on-{action}", judge(model=f"judge-{action}", on_error=action))
       for action in ("hold", "flag", "block", "return")},
}  # fmt: skip

SLOW: dict[str, Any] = {"delay_ms": 20_000}
POLICIES |= {
    "two": judged("two", judge(id="quick"), judge(id="slow", model="judge-2")),
    "patient": judged("patient", judge(model="judge-3")),
    "left": judged("left", judge(model="judge-left"), budget={"usd_per_day": 1}),
    "down": judged("down", judge(model="judge-down", on_error="flag")),
}

#: What may go wrong with a judge: how the upstream misbehaves as the judge, and the cause that is to be recorded.
FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "hangs": ({"fault": "hang"}, "timeout"),
    "slow": ({"delay_ms": 5000}, "timeout"),
    "dribbles": ({"fault": "slow_headers", "token_delay_ms": 500}, "timeout"),
    "hangs-up": ({"fault": "close"}, "provider"),
    "breaks-off": ({"fault": "close_mid"}, "provider"),
    "overloaded": ({"status": 529, "headers": {"x-should-retry": "false"}}, "provider"),
    "forbidden": ({"status": 403}, "provider"),
    "too-long": ({"status": 400, "error": {"code": "context_length_exceeded"}}, "provider"),
    "garbage": ({"fault": "garbage"}, "provider"),
    "page": ({"fault": "html502", "headers": {"x-should-retry": "false"}}, "provider"),
    "prose": ({"text": "Looks fine to me: yes."}, "verdict"),
    "no-nonce": ({"text": '{"nonce":"0","ok":"yes","why":"-"}'}, "verdict"),
    "two-objects": ({"text": '{"nonce":"NONCE","ok":"no","why":""}{"nonce":"NONCE","ok":"yes","why":""}'}, "verdict"),
    "twice": ({"text": '{"nonce":"NONCE","ok":"no","ok":"yes","why":""}'}, "verdict"),
    "other-label": ({"labels": {"ok": "maybe"}}, "verdict"),
    "cut-off": ({"finish_reason": "length"}, "verdict"),
    "no-probabilities": ({"logprobs": "absent"}, "verdict"),
    "silent": ({"text": ""}, "verdict"),
    "refuses": ({"refusal": "I would rather not."}, "verdict"),
}  # fmt: skip
POLICIES |= {name: judged(name, judge(model=f"judge-{name}"), budget=LATENCY) for name in FAULTS}


@pytest.fixture(scope="module")
def court(upstream: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A gateway with all of these policies, each of whose faults has a judge's model of its own."""
    config = write_config(
        tmp_path_factory.mktemp("court"),
        upstream_url=upstream.url,
        policies=POLICIES,
        models=[
            {"match": "judge-*", "base_url": f"{upstream.url}/v1", "price": PRICE},
            {"match": "*", "base_url": f"{upstream.url}/v1"},
        ],
    )
    with start_gateway(config, name="court") as server:
        yield server
    assert not server.tracebacks


Said = dict[str, Any]
OpenAIClient = Callable[..., openai.OpenAI]


def ask(
    client: openai.OpenAI, text: str, judges: dict[str, Said], **fields: Any
) -> tuple[str, dict[str, Any]]:
    """What the client got (`answered`, or the code of the error), and the decision."""
    prompt = scripted(text=text, judges=judges)
    try:
        raw = client.chat.completions.with_raw_response.create(
            model="demo-large", messages=[{"role": "user", "content": prompt}], **fields
        )
        decision_id, got = raw.headers["x-holdgate-decision"], "answered"
    except openai.APIStatusError as error:
        decision_id, got = error.response.headers["x-holdgate-decision"], str(error.code)
    url = str(client.base_url).removesuffix("/v1/")
    return got, httpx.get(f"{url}/decisions/{decision_id}").raise_for_status().json()


def result_of(decision: dict[str, Any], check: str = "sound") -> dict[str, Any]:
    """What a decision records of a check."""
    result: dict[str, Any] = decision["detail"]["evidence"]["results"][check]
    return result


def counted(server: Server, metric: str, **labels: str) -> float:
    """The value of a counter with these labels."""
    text = httpx.get(f"{server.url}/metrics").text
    lines = re.findall(rf"^{metric}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    wanted = {f'{name}="{value}"' for name, value in labels.items()}
    return sum(float(value) for found, value in lines if wanted <= set(found.split(",")))


GOOD, BAD = {"*": {"certainty": 0.9}}, {"*": {"labels": {"ok": "no"}, "certainty": 0.9}}


def test_a_judge_lets_a_right_answer_pass_and_its_score_and_cost_are_recorded(
    court: Server, client_for: ClientFor
) -> None:
    got, decision = ask(client_for("judged", court), "Two and two is four.", GOOD)
    result = result_of(decision)
    assert (got, result["outcome"]) == ("answered", "pass")
    assert result["score"] == pytest.approx(0.9)
    assert result["opinion"]["method"] == "logprob"
    assert result["opinion"]["models"] == ["judge-1"]
    assert result["opinion"]["rationale"] == "That is what the script says."
    assert 0 < result["cost_usd"] < 0.01
    assert counted(court, "holdgate_verdicts_total", judge="sound", outcome="pass") >= 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_judge_stops_a_wrong_answer_streamed_or_not(
    court: Server, client_for: ClientFor, stream: bool
) -> None:
    got, decision = ask(client_for("judged", court), f"It is five, {stream}.", BAD, stream=stream)
    assert (got, decision["action"]) == ("response_blocked", "block")
    assert result_of(decision)["score"] == pytest.approx(0.1)
    assert "Is the answer right?" in json.dumps(decision["reasons"])


@pytest.mark.parametrize("name", FAULTS)
def test_whatever_is_wrong_with_a_judge_is_recorded_counted_and_decided_by_on_error(
    court: Server, client_for: ClientFor, name: str
) -> None:
    script, cause = FAULTS[name]
    before = counted(court, "holdgate_judge_failures_total", model=f"judge-{name}", cause=cause)
    got, decision = ask(client_for(name, court), f"Answer for {name}.", {"*": script})
    result = result_of(decision)
    assert (got, decision["action"]) == ("response_held", "hold")
    assert (result["outcome"], result["score"], result["cause"]) == ("error", None, cause)
    assert result["error"]
    after = counted(court, "holdgate_judge_failures_total", model=f"judge-{name}", cause=cause)
    assert after == before + 1


@pytest.mark.parametrize(
    ("action", "got"),
    [
        ("hold", "response_held"),
        ("flag", "answered"),
        ("block", "response_blocked"),
        ("return", "answered"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_on_error_says_what_becomes_of_an_answer_that_could_not_be_judged(
    court: Server, client_for: ClientFor, action: str, got: str, stream: bool
) -> None:
    judges = {"*": {"text": "Well."}}
    found = ask(client_for(f"on-{action}", court), f"{action} {stream}", judges, stream=stream)
    assert (found[0], found[1]["action"]) == (got, action)


def test_a_transient_fault_of_a_judge_is_tried_again(court: Server, client_for: ClientFor) -> None:
    shaky = {"attempts": [{"status": 503}, {"fault": "close"}, {}], "id": "shaky"}
    got, decision = ask(client_for("judged", court), "Tried again.", {"*": shaky})
    assert (got, result_of(decision)["outcome"]) == ("answered", "pass")


@pytest.mark.parametrize(("task", "outcome"), [("no-logprobs", "error"), ("no-schema", "pass")])
def test_a_judge_that_refuses_a_parameter_is_asked_without_and_so_from_then_on(
    court: Server, client_for: ClientFor, upstream_calls: UpstreamCalls, task: str, outcome: str
) -> None:
    """Without logprobs a judge that scores by them cannot tell; without a schema it can."""
    client = client_for(task, court)
    answers = [ask(client, f"{task} {number}", {"*": {}})[1] for number in range(2)]
    assert [result_of(each)["outcome"] for each in answers] == [outcome, outcome]
    # Two answers, one question refused, two questions without.
    assert len(upstream_calls(finished=5)) == 5


def test_the_same_question_is_asked_once_and_its_verdict_costs_nothing_again(
    court: Server, client_for: ClientFor, upstream_calls: UpstreamCalls
) -> None:
    client = client_for("judged", court)
    (_, first), (_, second) = (ask(client, "Said before.", GOOD) for _ in range(2))
    assert len(upstream_calls(finished=3)) == 3
    assert (result_of(first)["cached"], result_of(second)["cached"]) == (False, True)
    assert result_of(second)["score"] == result_of(first)["score"]
    assert result_of(first)["cost_usd"] > 0 == result_of(second)["cost_usd"]
    assert result_of(second)["opinion"]["rationale"]


def test_the_same_question_asked_by_many_at_once_is_asked_once(
    court: Server, client_for: ClientFor, upstream_calls: UpstreamCalls
) -> None:
    client = client_for("judged", court)
    judges = {"*": {"delay_ms": 400}}
    found: list[dict[str, Any]] = []

    def one() -> None:
        found.append(ask(client, "Asked by many.", judges)[1])

    threads = [threading.Thread(target=one) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result_of(each)["cached"] for each in found) == [False] + 5 * [True]
    assert len(upstream_calls(finished=7)) == 7


def test_errors_are_not_remembered(court: Server, client_for: ClientFor) -> None:
    client = client_for("judged", court)
    script = {"attempts": [{"text": "Hm."}, {}], "id": "forgetful"}
    outcomes = [result_of(ask(client, "Error.", {"*": script})[1])["outcome"] for _ in range(2)]
    assert outcomes == ["error", "pass"]


@pytest.mark.parametrize(
    ("task", "kept"),
    [
        ("judged", "Call +1 212 555 0123 about it."),
        ("redacted", "Call [redacted:phone] about it."),
        ("digest", ""),
    ],
)
def test_what_a_judge_says_is_content_and_kept_as_the_policy_says(
    court: Server, client_for: ClientFor, task: str, kept: str
) -> None:
    script = {"*": {"reasoning": "Call +1 212 555 0123 about it."}}
    _, decision = ask(client_for(task, court), f"Reasons, {task}.", script)
    assert result_of(decision)["opinion"]["rationale"] == kept


def test_judges_are_asked_side_by_side(court: Server, client_for: ClientFor) -> None:
    judges = {"*": {"delay_ms": 600}}
    _, decision = ask(client_for("two", court), "Side by side.", judges)
    assert [result_of(decision, check)["outcome"] for check in ("quick", "slow")] == ["pass"] * 2
    assert 600 <= decision["latency_ms"] < 1200


def test_a_judge_whose_answer_no_longer_matters_is_stopped(
    court: Server, client_for: ClientFor, upstream_calls: UpstreamCalls
) -> None:
    judges = {"judge-1": {"labels": {"ok": "no"}}, "judge-2": SLOW}
    got, decision = ask(client_for("two", court), "One judge is enough.", judges)
    assert got == "response_blocked"
    assert decision["latency_ms"] < 5000
    assert result_of(decision, "slow")["cause"] == "cancelled"
    calls = upstream_calls(finished=3)
    assert [call["aborted"] for call in calls].count(True) == 1
    cause = {"judge": "slow", "model": "judge-2", "cause": "cancelled"}
    assert counted(court, "holdgate_judge_failures_total", **cause) == 1
    action = {r["source"]: r["action"] for r in decision["detail"]["decision"]["reasons"]}
    assert action["check:slow"] is None


def test_judges_are_done_before_their_client_gives_up(court: Server, client_for: ClientFor) -> None:
    got, decision = ask(client_for("patient", court, timeout=2), "Be quick.", {"*": SLOW})
    assert got == "response_held"
    assert result_of(decision)["cause"] == "timeout"
    assert 1200 <= decision["latency_ms"] < 2000


def test_a_client_that_leaves_takes_its_judges_with_it_and_what_they_cost_counts(
    court: Server, client_for: ClientFor, upstream_calls: UpstreamCalls
) -> None:
    prompt = scripted(text="Nobody waits for this.", judges={"*": SLOW})
    body = {"model": "demo-large", "messages": [{"role": "user", "content": prompt}]}
    headers = {"x-holdgate-task": "left"}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{court.url}/v1/chat/completions", json=body, headers=headers, timeout=1)
    calls = upstream_calls(finished=2)
    assert [call["aborted"] for call in calls] == [False, True]
    assert abandoned_usd(court) > 0


def abandoned_usd(server: Server) -> float:
    """What judges cost that no decision carries, once it is recorded."""
    for _ in range(100):
        found = httpx.get(f"{server.url}/admin/economics").raise_for_status().json()
        if found["abandoned_usd"]:
            break
        time.sleep(0.1)
    return float(found["abandoned_usd"])


def test_a_judge_that_is_down_is_left_alone_and_readyz_names_it(
    court: Server, client_for: ClientFor, upstream_calls: UpstreamCalls
) -> None:
    client = client_for("down", court)
    down = {"*": {"status": 404}}
    causes = [
        result_of(ask(client, f"Down {number}.", down)[1])["cause"]
        for number in range(FAILURES + 2)
    ]
    assert causes == FAILURES * ["provider"] + 2 * ["unavailable"]
    assert httpx.get(f"{court.url}/readyz").json()["judges_down"] == ["judge-down"]
    asked = 2 * FAILURES + 2
    assert len(upstream_calls(finished=asked)) == asked


def test_readyz_names_a_calibrator_whose_judge_has_changed(
    gateway: GatewayFactory, openai_client: OpenAIClient, tmp_path: Path
) -> None:
    folder = tmp_path / "fitted"
    folder.mkdir()
    demo = json.loads((PACKAGED_CONFIG / "calibrators" / "demo.json").read_text())
    changes = {
        "name": "old",
        "source": "judge",
        "score": {"kind": "signal", "name": "judge.sound"},
        "judges": {"sound": "0" * 64},
    }
    (folder / "old.json").write_text(json.dumps(demo | changes))
    confidence = {"source": "judge", "calibrator": "old", "when_uncalibrated": "flag"}
    policies = {"judged": judged("judged", match={}, confidence=confidence)}
    server = gateway(policies, calibrators=str(folder))
    (stale,) = httpx.get(f"{server.url}/readyz").json()["stale"]
    assert stale.startswith("policy judged: calibrator old is stale")
    got, decision = ask(openai_client(server.url), "Uncalibrated.", GOOD)
    assert (got, decision["action"], decision["confidence"]) == ("answered", "flag", None)


# ---------------------------------------------------------------------------------------------------------- recursion


def test_a_judges_question_is_refused_at_every_checked_endpoint(court: Server) -> None:
    for path in ("chat/completions", "completions", "responses"):
        refused = httpx.post(
            f"{court.url}/v1/{path}",
            json={"model": "m"},
            headers={"via": "1.0 fred, 1.1 holdgate-judge (nested)"},
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "judge_refused")
        assert refused.headers["x-should-retry"] == "false"


def test_another_proxys_via_is_nobodys_question(court: Server, client_for: ClientFor) -> None:
    client = client_for("judged", court)
    headers = {"via": "1.1 vegur, 1.1 holdgate-judges.example"}
    got, _ = ask(client, "By way of a proxy.", GOOD, extra_headers=headers)
    assert got == "answered"


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_a_judge_whose_address_is_a_gateway_fails_and_does_not_recur(
    gateway: GatewayFactory,
    openai_client: OpenAIClient,
    upstream: Server,
    upstream_calls: UpstreamCalls,
    provider: str,
) -> None:
    """Two gateways whose judges point at each other; through litellm too the mark gets across."""
    policies = {"judged": judged("judged", match={})}
    second = gateway(policies, name="second")
    address = {"base_url": f"{second.url}/v1", "provider": provider}
    models = [
        {"match": "judge-*", **address},
        {"match": "*", "base_url": f"{upstream.url}/v1"},
    ]
    first = gateway(policies, name="first", models=models)
    got, decision = ask(openai_client(first.url), "Round and round.", GOOD)
    result = result_of(decision)
    assert (got, result["cause"]) == ("response_held", "provider")
    assert "403" in result["error"]
    assert len(upstream_calls(finished=1)) == 1
