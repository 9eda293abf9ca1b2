"""Streams: the same decision as without, and what each mode lets through when."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gateway.demo import SCENARIOS
from tests.acceptance.acting import ENDPOINTS, PATHS, request, scripted
from tests.acceptance.conftest import POLICIES, ClientFor
from tests.acceptance.wire import DONE, events, said
from tests.conftest import GatewayFactory, UpstreamCalls
from tests.validators.exchanges import joined

VECTORS = Path(__file__).parent.parent / "vectors"


def decision(http: httpx.Client, answer: httpx.Response) -> dict[str, Any]:
    """The decision on an answer as it is recorded, once it is."""
    path = http.base_url.join(f"/decisions/{answer.headers['x-holdgate-decision']}")
    deadline_s = time.monotonic() + 10
    while (shown := http.get(path)).status_code == 404 and time.monotonic() < deadline_s:
        pass
    told: dict[str, Any] = shown.raise_for_status().json()
    return told


# --------------------------------------------------------------------------- the same decision either way


def corpus() -> Iterator[dict[str, Any]]:
    """Scripts of all kinds of answers: those of the demo, and the examples that come with the checks."""
    for scenario in SCENARIOS:
        yield scenario.script.attempt(0).model_dump(exclude_defaults=True)
    for name in ("finish_reason", "forbid", "pii", "redact", "secrets", "tool_calls"):
        for case in json.loads((VECTORS / f"{name}.json").read_text("utf-8")):
            for choice in case["exchange"]["choices"]:
                script = {
                    k: choice[k] for k in ("refusal", "reasoning", "tool_calls") if k in choice
                }
                script |= {k: choice[k] for k in ("finish_reason",) if choice.get(k)}
                script |= {"text": joined(choice["text"])} if "text" in choice else {}
                if len(json.dumps(script)) < 2000:
                    yield script
    yield {"texts": ["One.", "It has ORD-123456.", "ada@example.com"]}
    yield {"text": "It is CODE-1234."}
    yield {"text": "", "certainty": 0.3}
    yield {"text": "🦉 and ünïcödé, " * 5, "certainty": 0.7}


#: What a completion can say: no tool calls, no refusals.
_PLAIN = {"text", "texts", "finish_reason", "certainty"}


@pytest.mark.parametrize("task", ["everything", "scored-live"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_stream_is_decided_on_and_delivered_as_the_whole_answer_is(
    http: httpx.Client, endpoint: str, task: str
) -> None:
    actions = set()
    for script in corpus():
        if endpoint == "completions" and not set(script) <= _PLAIN:
            continue
        whole, streamed = either_way(http, endpoint, task, script)
        decided, numbers = recorded(decision(http, whole))
        decided_too, numbers_too = recorded(decision(http, streamed))
        assert decided_too == decided, script
        assert numbers_too == pytest.approx(numbers, abs=1e-9), script
        assert streamed.status_code == whole.status_code
        assert whole.status_code != 200 or said(endpoint, streamed) == said(endpoint, whole)
        actions.add(decided["action"])
    assert len(actions) > 1


def either_way(
    http: httpx.Client, endpoint: str, task: str, script: Mapping[str, Any]
) -> list[httpx.Response]:
    """What a script's answer comes to whole, and as a stream."""
    bodies = [request(endpoint, task, scripted(**script), stream=s) for s in (False, True)]
    return [http.post(PATHS[endpoint], json=b, headers={"prefer": "wait=0"}) for b in bodies]


def recorded(shown: Mapping[str, Any]) -> tuple[dict[str, Any], list[float]]:
    """What was decided and why; the numbers in it apart, -1 for none."""
    detail, evidence = shown["detail"]["decision"], shown["detail"]["evidence"]
    decided = {name: detail[name] for name in ("action", "band", "risk", "reasons", "redactions")}
    found = {name: (r["outcome"], r["findings"]) for name, r in evidence["results"].items()}
    signals = sorted(evidence["signals"].items())
    decided |= {
        "found": found,
        "absent": evidence["signals_absent"],
        "signals": list(dict(signals)),
    }
    numbers = [detail["score"], detail["confidence"], *(value for _, value in signals)]
    return decided, [-1.0 if number is None else number for number in numbers]


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_window_delivers_what_the_whole_answer_would_be(
    http: httpx.Client, endpoint: str
) -> None:
    for script in corpus():
        whole, streamed = either_way(http, endpoint, "window", script)
        if whole.status_code == 200:
            assert said(endpoint, streamed) == said(endpoint, whole), script
        else:
            error = events(streamed.content)[-1]["error"]
            assert error["code"] == whole.json()["error"]["code"] == "response_blocked"


# ------------------------------------------------------------------------------------------ live modes


@pytest.mark.parametrize("task", ["plain", "watch", "window", "scored-live", "scored-window"])
@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_text_reaches_the_client_while_the_model_still_speaks(
    http: httpx.Client, upstream_calls: UpstreamCalls, endpoint: str, task: str
) -> None:
    script = scripted(text="One two three four five. " * 20, token_delay_ms=15)
    body = request(endpoint, task, script, stream=True)
    with http.stream("POST", PATHS[endpoint], json=body) as answer:
        assert answer.headers["x-holdgate-policy"].startswith(f"{task}@")
        lines = answer.iter_lines()
        assert next(line for line in lines if "three" in line)
        [call] = upstream_calls(started=1)
        assert call["finished"] is None


@pytest.mark.parametrize("task", ["plain", "watch", "scored-live"])
def test_events_of_responses_reach_the_client_while_the_model_still_speaks(
    client_for: ClientFor, upstream_calls: UpstreamCalls, task: str
) -> None:
    prompt = scripted(text="One two three four five. " * 20, token_delay_ms=15)
    with client_for(task).responses.stream(model="demo-large", input=prompt) as stream:
        first = next(event for event in stream if event.type == "response.output_text.delta")
        assert first.delta == "One"
        assert upstream_calls(started=1)[0]["finished"] is None


BEFORE = "Let me think about this for a while. It is "
STOPPED: dict[str, dict[str, Any]] = {
    "text": {"text": f"{BEFORE}CODE-1234, you see."},
    "text at the end": {"text": f"{BEFORE}CODE-1234"},
    "refusal": {"refusal": f"{BEFORE}CODE-1234, you see."},
    "reasoning": {"reasoning": f"{BEFORE}CODE-1234, you see.", "text": "Fine."},
    "hidden": {
        "text": f"{BEFORE}C\u200bO\u200bD\u200bE\u200b-\u200b1\u200b2\u200b3\u200b4, you see."
    },
    "wide": {"text": f"{BEFORE}ＣＯＤＥ－１２３４, you see."},
    "tool arguments": {"tool_calls": [{"name": "pay", "arguments": f"{BEFORE}CODE-1234, see"}]},
    "escaped arguments": {
        "tool_calls": [{"name": "pay", "arguments": f"{BEFORE}\\u0043ODE\\u002d1234, see"}]
    },
    "the second choice": {
        "texts": ["Nothing at all to see here, I should say.", f"{BEFORE}CODE-1234"]
    },
}


#: What is JSON goes out at its end, so that not even what comes before a match does.
_WAITING = ("tool arguments", "escaped arguments")


@pytest.mark.parametrize(
    ("endpoint", "place"),
    [
        *(("chat", place) for place in STOPPED),
        *(("completions", place) for place, script in STOPPED.items() if set(script) <= _PLAIN),
    ],
)
def test_not_a_character_of_a_blocked_match_gets_through_a_window(
    http: httpx.Client, endpoint: str, place: str
) -> None:
    script = STOPPED[place]
    body = request(
        endpoint, "window", scripted(**script), stream=True, n=len(script.get("texts", "x"))
    )
    answer = http.post(PATHS[endpoint], json=body)
    assert answer.status_code == 200
    assert answer.content.endswith(DONE)
    last = events(answer.content)[-1]
    assert last["error"]["code"] == "response_blocked"
    assert last["error"]["decision"] == answer.headers["x-holdgate-decision"]
    spoken = said(endpoint, answer)
    assert BEFORE.startswith(spoken[-1])
    assert len(spoken[-1]) > len(BEFORE) - 30 or place in ("hidden", *_WAITING)
    shown = decision(http, answer)
    assert shown["action"] == "block"
    assert any(
        reason["source"] == "check:code" for reason in shown["detail"]["decision"]["reasons"]
    )


def test_a_blocked_window_ends_the_call_to_the_provider(
    http: httpx.Client, upstream_calls: UpstreamCalls
) -> None:
    script = scripted(text="It is CODE-1234. " + "And so on. " * 500, token_delay_ms=10)
    answer = http.post(PATHS["chat"], json=request("chat", "window", script, stream=True))
    assert events(answer.content)[-1]["error"]["code"] == "response_blocked"
    [call] = upstream_calls(finished=1)
    assert call["aborted"]


def test_the_sdk_gets_the_text_before_a_block_and_then_the_exception(client_for: ClientFor) -> None:
    messages: Any = [{"role": "user", "content": scripted(**STOPPED["text"])}]
    spoken = ""
    stream = client_for("window").chat.completions.create(
        model="demo-large", messages=messages, stream=True
    )
    with pytest.raises(openai.APIError) as caught:  # noqa: PT012 - what comes before the error counts
        for chunk in stream:
            spoken += chunk.choices[0].delta.content or ""
    assert caught.value.code == "response_blocked"
    assert BEFORE.startswith(spoken)
    assert len(spoken) > 20


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
@pytest.mark.parametrize(
    "text",
    [
        "Your ORD-123456 is late, and so is ORD-654321.",
        "ORD-123456",
        "Your O\u200bR\u200bD-1\u200b23456 is late.",
        "Your ＯＲＤ-123456 is late.",
        "ORD-ORD-123456ORD-1234567 ORD-12345",
    ],
)
def test_masks_are_put_on_across_the_borders_of_chunks(
    http: httpx.Client, endpoint: str, text: str
) -> None:
    body = request(endpoint, "window", scripted(text=text), stream=False)
    whole = said(endpoint, http.post(PATHS[endpoint], json=body))
    answer = http.post(PATHS[endpoint], json=body | {"stream": True})
    assert said(endpoint, answer) == whole
    assert "[redacted:order]" in whole[0]
    assert "23456" not in answer.text.replace("ORD-12345", "", 1)


def test_logprobs_do_not_spell_what_a_mask_covers(http: httpx.Client) -> None:
    fields = {"logprobs": True, "top_logprobs": 3}
    script = scripted(text="Your ORD-123456 is late.")
    for stream in (False, True):
        body = request("chat", "window", script, stream=stream, **fields)
        answer = http.post(PATHS["chat"], json=body)
        assert said("chat", answer) == ["Your [redacted:order] is late."]
        assert "123456" not in answer.text
        assert "1234" not in answer.text


def test_more_than_can_be_masked_ends_the_stream_of_a_window(http: httpx.Client) -> None:
    text = " ".join(f"ORD-{number:06}" for number in range(60))
    body = request("chat", "window", scripted(text=text), stream=True)
    answer = http.post(PATHS["chat"], json=body)
    assert events(answer.content)[-1]["error"]["code"] == "response_blocked"
    assert "ORD-" not in said("chat", answer)[0]
    assert decision(http, answer)["action"] == "block"


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_what_is_only_watched_flows_and_is_flagged_afterwards(
    http: httpx.Client, endpoint: str
) -> None:
    text = "It is CODE-1234, you see."
    body = request(endpoint, "watch", scripted(text=text), stream=True)
    answer = http.post(PATHS[endpoint], json=body)
    assert said(endpoint, answer) == [text]
    shown = decision(http, answer)
    assert shown["action"] == "flag"
    assert shown["review"]["kind"] == "flag"


@pytest.mark.parametrize("task", ["watch", "window"])
def test_a_stream_whose_client_left_is_still_decided_on(http: httpx.Client, task: str) -> None:
    script = scripted(text="It is so, you see. " * 50, token_delay_ms=10)
    body = request("chat", task, script, stream=True)
    with http.stream("POST", PATHS["chat"], json=body) as answer:
        assert next(answer.iter_raw())
    shown = decision(http, answer)
    assert shown["action"] == "return"
    assert "client went away" in shown["detail"]["note"]


def test_the_decision_is_durable_before_the_client_hears_the_end(gateway: GatewayFactory) -> None:
    server = gateway({name: POLICIES[name] for name in ("watch", "window", "whole")})
    ends = {"chat": b"[DONE]", "responses": b"response.completed"}
    for endpoint, task in (("responses", "watch"), ("chat", "window")):
        body = request(endpoint, task, scripted(text="It is CODE-12, you see."), stream=True)
        url = f"{server.url}/v1/{PATHS[endpoint]}"
        with httpx.stream("POST", url, json=body, timeout=20) as answer:
            decided = answer.headers["x-holdgate-decision"]
            seen = b""
            for piece in answer.iter_raw():
                seen += piece
                if ends[endpoint] in seen:
                    break
            server.kill()
        path = server.stderr.parent / "holdgate.db"
        with closing(sqlite3.connect(path)) as store:
            rows = store.execute("SELECT action FROM decisions WHERE id = ?", (decided,)).fetchall()
        assert rows == [("return",)], endpoint
        if endpoint == "responses":
            server.start()
