"""Which field of a JSON answer is doubtful: what the tokens said is shown to whoever reviews it, on every endpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.acceptance.acting import ENDPOINTS, PATHS, request, scripted
from tests.processes import Server, start_gateway, write_config


def _policy(name: str, then: str, more: str = "") -> str:
    return (
        f"policy: {name}\nmatch: {{task: {name}}}\nrisk: {{base: low}}\n"
        f"confidence: {{when_uncalibrated: {then}}}\naudit: {{rate: 0}}\n{more}"
    )


POLICIES = {
    "flagged": _policy("flagged", "flag"),
    "held": _policy("held", "hold", "hold: {wait: 0s}\n"),
    "observed": _policy("observed", "flag", "stream: observe\n"),
    "returned": _policy("returned", "return"),
    "redacted": _policy("redacted", "flag", "content: redacted\n"),
    "digest": _policy("digest", "flag", "content: digest\n"),
}


@pytest.fixture(scope="module")
def gateway(upstream: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    config = write_config(
        tmp_path_factory.mktemp("fields"), upstream_url=upstream.url, policies=POLICIES
    )
    with start_gateway(config) as server:
        yield server
    assert not server.tracebacks


@pytest.fixture
def http(gateway: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=gateway.url, timeout=30, trust_env=False) as client:
        yield client


def entry(text: str, logprob: float | None, data: bytes | None = None) -> dict[str, Any]:
    raw = list(text.encode() if data is None else data)
    return {"token": text, "logprob": logprob, "bytes": raw, "top_logprobs": []}


ORDER = (
    entry('{"sku":"', -0.3),
    entry("GA", -0.02),
    entry("67", -0.01),
    entry('","qty":', -0.2),
    entry("4", -0.7),
    entry("}", 0.0),
)


def asked(http: httpx.Client, endpoint: str, task: str, **fields: Any) -> dict[str, Any]:
    """The decision on a call."""
    body = request(endpoint, task, fields.pop("prompt"), **fields)
    answer = http.post(f"/v1/{PATHS[endpoint]}", json=body)
    assert answer.status_code in (200, 423), answer.text
    decision = http.get(f"/decisions/{answer.headers['x-holdgate-decision']}")
    return dict(decision.raise_for_status().json())


def fields_of(http: httpx.Client, decision: dict[str, Any]) -> list[dict[str, Any]]:
    """What the reviewer of a decision is shown; the same as is recorded with it."""
    shown = http.get(f"/review/{decision['review']['id']}").raise_for_status().json()
    assert shown["fields"] == decision["detail"]["evidence"]["fields"]
    return list(shown["fields"])


@pytest.mark.parametrize("task", ["flagged", "held"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_reviewer_sees_the_doubtful_field_first(
    http: httpx.Client, endpoint: str, stream: bool, task: str
) -> None:
    prompt = scripted(logprobs=ORDER)
    found = fields_of(http, asked(http, endpoint, task, prompt=prompt, stream=stream))
    content = {
        "chat": "choices[0].message.content",
        "completions": "choices[0].text",
        "responses": "output[0].content[0].text",
    }[endpoint]
    assert [each["path"] for each in found] == [f"{content}#/qty", f"{content}#/sku"]
    qty, sku = found
    assert qty["token_probability"] == pytest.approx(math.exp(-0.7))
    assert sku["token_probability"] == pytest.approx(math.exp(-0.03))
    assert sku["least_probability"] == pytest.approx(math.exp(-0.02))
    assert (qty["n_tokens"], sku["n_tokens"]) == (1, 2)


def test_a_stream_that_was_let_through_has_fields_like_any_other(http: httpx.Client) -> None:
    body = request("chat", "observed", scripted(logprobs=ORDER), stream=True)
    answer = http.post("/v1/chat/completions", json=body)
    assert '"logprob":' not in answer.text
    decision = http.get(f"/decisions/{answer.headers['x-holdgate-decision']}").json()
    assert fields_of(http, decision)[0]["path"] == "choices[0].message.content#/qty"


def test_arguments_of_tool_calls_have_fields_too(http: httpx.Client) -> None:
    call = {"name": "pay", "arguments": {"amount": 25000, "to": "ada"}}
    prompt = scripted(tool_calls=[call], certainty=0.6)
    found = fields_of(http, asked(http, "chat", "held", prompt=prompt))
    where = "choices[0].message.tool_calls[0].function.arguments"
    assert {each["path"] for each in found} == {f"{where}#/amount", f"{where}#/to"}


def test_every_choice_has_fields(http: httpx.Client) -> None:
    prompt = scripted(texts=['{"a": 1}', '{"a": 2}'])
    found = fields_of(http, asked(http, "chat", "flagged", prompt=prompt, n=2))
    paths = {f"choices[{n}].message.content#/a" for n in range(2)}
    assert {each["path"] for each in found} == paths


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_characters_split_between_tokens_are_put_together_by_their_bytes(
    http: httpx.Client, stream: bool
) -> None:
    # The scripted model splits such characters in two tokens, whose texts are then escapes.
    prompt = scripted(text='{"mood": "😀", "n": 1}')
    found = fields_of(http, asked(http, "chat", "flagged", prompt=prompt, stream=stream))
    assert {each["path"].split("#")[1]: each["n_tokens"] for each in found} == {"/mood": 2, "/n": 1}


@pytest.mark.parametrize("logprobs", ["null", "absent"])
def test_without_usable_logprobs_there_are_no_fields(http: httpx.Client, logprobs: str) -> None:
    prompt = scripted(text='{"a": 1}', logprobs=logprobs)
    decision = asked(http, "chat", "flagged", prompt=prompt)
    assert fields_of(http, decision) == []


def test_fields_whose_logprob_is_missing_are_left_out_alone(http: httpx.Client) -> None:
    written = [*ORDER[:4], entry("4", None), ORDER[5]]
    decision = asked(http, "chat", "flagged", prompt=scripted(logprobs=written))
    assert decision["detail"]["evidence"]["signals_absent"] == "partial"
    (field,) = fields_of(http, decision)
    assert field["path"].endswith("#/sku")


def test_nothing_is_told_of_fields_that_nobody_reviews(http: httpx.Client) -> None:
    decision = asked(http, "chat", "returned", prompt=scripted(logprobs=ORDER))
    assert decision["review"] is None
    assert decision["detail"]["evidence"]["fields"] == []


@pytest.mark.parametrize(
    ("task", "paths"),
    [
        ("flagged", ["choices[0].message.content#/ada@example.com"]),
        ("redacted", ["choices[0].message.content#/[redacted:email]"]),
        ("digest", []),
    ],
)
def test_keys_of_fields_are_content_and_kept_as_the_policy_says(
    http: httpx.Client, task: str, paths: list[str]
) -> None:
    prompt = scripted(text='{"ada@example.com": 3}')
    decision = asked(http, "chat", task, prompt=prompt)
    assert [each["path"] for each in fields_of(http, decision)] == paths
