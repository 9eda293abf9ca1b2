"""A held response, from the moment its client begins to wait until somebody, or nobody, has decided."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from gateway.records import Role
from tests.acceptance.acting import (
    ENDPOINTS,
    PATHS,
    Reviewer,
    caller,
    make_keys,
    official,
    policy,
    request,
    scripted,
    text_of,
    until,
)
from tests.conftest import GatewayFactory
from tests.processes import Server, start_gateway, write_config

_SHAPE = """stages:
  - name: rules
    checks:
      - id: shape
        use: json_schema
        target: tool_arguments
        tool: issue_refund
        schema:
          type: object
          properties: {amount: {type: number, maximum: 500}}
          required: [amount]
        on_fail: hold
hold: {wait: 20s}"""

POLICIES = {
    "held": policy("held", "hold: {wait: 20s}"),
    "at_once": policy("at_once", "hold: {wait: 0s}"),
    "chat_window": policy("chat_window", "hold: {wait: 20s, as: placeholder}"),
    "shaped": policy("shaped", _SHAPE),
    "lapses": policy("lapses", "hold: {wait: 20s, deadline: 500ms}"),
    "released": policy(
        "released", "hold: {wait: 20s, deadline: 500ms, on_deadline: release}", tier="high"
    ),
    "never_released": policy(
        "never_released", "hold: {wait: 20s, deadline: 500ms, on_deadline: release}"
    ),
}
PLAIN = {"plain": "policy: plain\nconfidence: {source: none, when_uncalibrated: return}\n"}
PEOPLE = {
    "app": Role.CLIENT,
    "neighbour": Role.CLIENT,
    "ann": Role.REVIEWER,
    "ben": Role.REVIEWER,
}


@dataclass(frozen=True)
class House:
    """A running gateway and the API keys of the people in it."""

    gateway: Server
    keys: dict[str, str]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def house(
    request: pytest.FixtureRequest, upstream: Server, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[House]:
    folder = tmp_path_factory.mktemp(f"house-{request.param}")
    if request.param == "postgres":
        store_url = request.getfixturevalue("postgres").new_database()
    else:
        store_url = f"sqlite:///{folder / 'holdgate.db'}"
    config = write_config(
        folder,
        upstream_url=upstream.url,
        policies=POLICIES,
        store_url=store_url,
        hold={"keepalive_s": 0.1},
    )
    keys = asyncio.run(make_keys(store_url, PEOPLE))
    with start_gateway(config) as gateway:
        yield House(gateway, keys)
    assert not gateway.tracebacks


#: What has nothing to do with the store is tried on one of them.
SQLITE_ONLY = pytest.mark.parametrize("house", ["sqlite"], indirect=True)


@dataclass(frozen=True)
class Cast:
    """Everybody in a house, ready to act: `http` and `sdk` are the application, both with its key."""

    http: httpx.AsyncClient
    sdk: openai.AsyncOpenAI
    neighbour: httpx.AsyncClient
    ann: Reviewer
    ben: Reviewer

    async def ask(
        self, endpoint: str, task: str, prompt: str, *, headers: Any = None, **fields: Any
    ) -> httpx.Response:
        """The answer to one call."""
        body = request(endpoint, task, prompt, **fields)
        return await self.http.post(f"/v1/{PATHS[endpoint]}", json=body, headers=headers)


@pytest.fixture
async def cast(house: House) -> AsyncIterator[Cast]:
    async with AsyncExitStack() as stack:
        clients = {
            name: await stack.enter_async_context(caller(house.gateway.url, key))
            for name, key in house.keys.items()
        }
        sdk = await stack.enter_async_context(official(house.gateway.url, house.keys["app"]))
        yield Cast(
            clients["app"],
            sdk,
            clients["neighbour"],
            Reviewer(clients["ann"]),
            Reviewer(clients["ben"]),
        )


def events_of(stream: str) -> list[str]:
    """The data of every event of a stream, comments left out."""
    return [line[6:] for line in stream.splitlines() if line.startswith("data: ")]


# ------------------------------------------------------------------------------------------------ a client waits


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_approved_response_reaches_the_waiting_client_as_the_provider_sent_it(
    cast: Cast, endpoint: str
) -> None:
    prompt = scripted(text=f"All is well with {endpoint}.", extra={"body": {"novel": [1, None]}})
    waiting = asyncio.create_task(cast.ask(endpoint, "held", prompt))
    task = await cast.ann.approve(f"All is well with {endpoint}.")
    answer = await waiting
    shown = (await cast.ann.http.get(f"/review/{task['id']}")).json()
    assert answer.status_code == 200
    assert answer.json() == shown["response"]
    assert answer.json()["novel"] == [1, None]
    assert text_of(endpoint, answer.json()) == f"All is well with {endpoint}."
    assert answer.headers["x-holdgate-action"] == "hold"
    assert answer.headers["x-holdgate-decision"] == task["decision_id"]


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_held_stream_is_kept_alive_by_comments_and_then_is_a_stream_like_any_other(
    cast: Cast, endpoint: str
) -> None:
    said = f"Streamed, in the end, by {endpoint}."
    more = {} if endpoint == "responses" else {"stream_options": {"include_usage": True}}
    body = request(endpoint, "held", scripted(text=said), stream=True, **more)
    async with cast.http.stream("POST", f"/v1/{PATHS[endpoint]}", json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        pieces = answer.aiter_text()
        before = ""
        while before.count(": held for review") < 3:
            before += await anext(pieces)
        assert events_of(before) == []
        await cast.ann.approve(said)
        events = events_of("".join([piece async for piece in pieces]))
    if endpoint == "responses":
        kinds = [orjson.loads(event)["type"] for event in events]
        assert kinds[0] == "response.created"
        assert kinds[-1] == "response.completed"
        assert text_of(endpoint, orjson.loads(events[-1])["response"]) == said
        return
    assert events[-1] == "[DONE]"
    chunks = [orjson.loads(event) for event in events[:-1]]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] > 0
    parts = [choice for chunk in chunks for choice in chunk["choices"]]
    texts = [p.get("text") or (p.get("delta") or {}).get("content") or "" for p in parts]
    assert "".join(texts) == said
    assert parts[-1]["finish_reason"] == "stop"


@SQLITE_ONLY
async def test_official_client_streams_a_held_response_and_notices_nothing(cast: Cast) -> None:
    async def stream() -> list[str]:
        asked = await cast.sdk.chat.completions.create(
            model="demo-large",
            messages=[{"role": "user", "content": scripted(text="Seen by the SDK.")}],
            metadata={"task": "held"},
            stream=True,
        )
        return [chunk.choices[0].delta.content or "" async for chunk in asked]

    waiting = asyncio.create_task(stream())
    await cast.ann.approve("Seen by the SDK.")
    assert "".join(await waiting) == "Seen by the SDK."


@SQLITE_ONLY
async def test_official_client_reads_an_approved_responses_stream(cast: Cast) -> None:
    async def stream() -> str:
        async with cast.sdk.responses.stream(
            model="demo-large",
            input=scripted(text="Read event by event."),
            metadata={"task": "held"},
        ) as events:
            return (await events.get_final_response()).output_text

    waiting = asyncio.create_task(stream())
    await cast.ann.approve("Read event by event.")
    assert await waiting == "Read event by event."


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_corrected_text_is_what_the_client_gets(
    cast: Cast, endpoint: str, streamed: bool
) -> None:
    marker = f"Nearly right {endpoint} {streamed}"
    waiting = asyncio.create_task(
        cast.ask(endpoint, "held", scripted(text=marker), stream=streamed)
    )
    task = await cast.ann.task(marker)
    await cast.ann.submit(task["id"], "correct", correction="Quite right.")
    answer = await waiting
    assert answer.status_code == 200
    if streamed:
        assert "Quite right." in answer.text
        assert "Nearly" not in answer.text
    else:
        assert text_of(endpoint, answer.json()) == "Quite right."
    decision = (await cast.http.get(f"/decisions/{task['decision_id']}")).json()
    assert decision["review"]["status"] == "corrected"


async def test_one_of_several_choices_is_corrected_by_its_path(cast: Cast) -> None:
    prompt = scripted(texts=["first of two", "second of two"])
    waiting = asyncio.create_task(cast.ask("chat", "held", prompt, n=2))
    task = await cast.ann.task("second of two")
    vague = await cast.ann.submit(task["id"], "correct", correction="which one?")
    assert vague.status_code == 400
    assert "choices[1].message.content" in vague.json()["error"]["message"]
    unknown = await cast.ann.submit(
        task["id"], "correct", correction={"choices[2].message.content": "x"}
    )
    assert unknown.status_code == 400
    path = "choices[1].message.content"
    (await cast.ann.submit(task["id"], "correct", correction={path: "mended"})).raise_for_status()
    choices = (await waiting).json()["choices"]
    assert [choice["message"]["content"] for choice in choices] == ["first of two", "mended"]


async def test_correction_that_breaks_the_schema_is_refused_with_findings_and_changes_nothing(
    cast: Cast,
) -> None:
    prompt = scripted(tool_calls=[{"name": "issue_refund", "arguments": {"amount": 9000}}])
    waiting = asyncio.create_task(cast.ask("chat", "shaped", prompt))
    task = await cast.ann.task("9000")
    path = "choices[0].message.tool_calls[0].function.arguments"
    bad = await cast.ann.submit(task["id"], "correct", correction={path: '{"amount": "9"}'})
    assert bad.status_code == 400
    assert bad.json()["error"]["code"] == "correction_invalid"
    assert any("amount" in finding for finding in bad.json()["error"]["findings"])
    worse = await cast.ann.submit(task["id"], "correct", correction={path: "{"})
    assert worse.status_code == 400
    good = await cast.ann.submit(task["id"], "correct", correction={path: '{"amount": 90}'})
    assert good.status_code == 200
    answer = await waiting
    call = answer.json()["choices"][0]["message"]["tool_calls"][0]
    assert orjson.loads(call["function"]["arguments"]) == {"amount": 90}


@pytest.mark.parametrize(
    "correction", [b'"half a pair: \\ud83d"', b'{"choices[0].message.content": "\\udc00"}']
)
@SQLITE_ONLY
async def test_correction_that_is_no_unicode_is_refused(cast: Cast, correction: bytes) -> None:
    marker = f"uncorrected {len(correction)}"
    waiting = asyncio.create_task(cast.ask("chat", "held", scripted(text=marker)))
    task = await cast.ann.task(marker)
    refused = await cast.ann.http.post(
        f"/review/{task['id']}/submit",
        content=b'{"verdict": "correct", "correction": %s}' % correction,
        headers={"content-type": "application/json"},
    )
    assert refused.status_code == 400
    assert "correction" in refused.json()["error"]["message"].lower()
    await cast.ann.submit(task["id"], "approve")
    assert (await waiting).status_code == 200


@pytest.mark.parametrize("correction", [None, {}, ""], ids=["none", "empty", "blank"])
@SQLITE_ONLY
async def test_correction_without_a_text_is_refused(cast: Cast, correction: object) -> None:
    waiting = asyncio.create_task(
        cast.ask("chat", "held", scripted(text=f"uncorrected {correction}"))
    )
    task = await cast.ann.task(f"uncorrected {correction}")
    refused = await cast.ann.submit(task["id"], "correct", correction=correction)
    assert refused.status_code == 400
    await cast.ann.submit(task["id"], "approve")
    assert (await waiting).status_code == 200


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_rejection_tells_the_client_why_and_not_to_ask_again(
    cast: Cast, endpoint: str
) -> None:
    waiting = asyncio.create_task(cast.ask(endpoint, "held", scripted(text=f"bad {endpoint}")))
    task = await cast.ann.task(f"bad {endpoint}")
    await cast.ann.submit(task["id"], "reject", reason="off topic", comment="for colleagues only")
    answer = await waiting
    assert answer.status_code == 403
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert error["code"] == "response_rejected"
    assert "off topic" in error["message"]
    assert error["hold"] == {"id": task["decision_id"], "status": "rejected"}
    assert "colleagues" not in answer.text
    assert f"bad {endpoint}" not in answer.text


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@SQLITE_ONLY
async def test_rejection_of_a_stream_is_an_error_the_official_client_raises(
    cast: Cast, endpoint: str
) -> None:
    prompt = scripted(text=f"bad stream of {endpoint}")

    async def stream() -> None:
        create: Any = (
            cast.sdk.responses.create
            if endpoint == "responses"
            else cast.sdk.chat.completions.create
        )
        async for _ in await create(**request(endpoint, "held", prompt, stream=True)):
            pass

    waiting = asyncio.create_task(stream())
    task = await cast.ann.task(f"bad stream of {endpoint}")
    await cast.ann.submit(task["id"], "reject", reason="off topic")
    with pytest.raises(openai.APIError, match="off topic") as raised:
        await waiting
    assert raised.value.code == "response_rejected"


# -------------------------------------------------------------------------------------------- the wait runs out


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_wait_that_runs_out_says_where_to_ask_again(cast: Cast, endpoint: str) -> None:
    before = datetime.now(UTC)
    answer = await cast.ask(endpoint, "at_once", scripted(text=f"later {endpoint}"))
    assert answer.status_code == 423
    assert answer.headers["x-should-retry"] == "false"
    error = answer.json()["error"]
    assert (error["type"], error["code"], error["param"]) == ("policy_hold", "response_held", None)
    hold = error["hold"]
    assert set(hold) == {"id", "status", "url", "expires_at", "estimated_wait_s"}
    assert hold["status"] == "held"
    assert answer.headers["location"] == hold["url"]
    due = datetime.fromisoformat(hold["expires_at"]) - before
    assert timedelta(minutes=29) < due < timedelta(minutes=31)
    pending = await cast.http.get(hold["url"])
    assert pending.status_code == 423
    await cast.ann.approve(f"later {endpoint}")
    answer = await cast.http.get(hold["url"])
    assert answer.status_code == 200
    assert text_of(endpoint, answer.json()) == f"later {endpoint}"


async def test_estimate_of_the_wait_follows_what_reviewers_took(cast: Cast) -> None:
    await cast.ask("chat", "at_once", scripted(text="to learn the pace"))
    await cast.ann.approve("to learn the pace")
    answer = await cast.ask("chat", "at_once", scripted(text="how long?"))
    assert 0 <= answer.json()["error"]["hold"]["estimated_wait_s"] < 60
    await cast.ann.approve("how long?")


async def test_official_client_raises_once_and_fetches_the_response_later_by_its_id(
    cast: Cast,
) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        await cast.sdk.chat.completions.create(
            model="demo-large",
            messages=[{"role": "user", "content": scripted(text="fetched by id")}],
            metadata={"task": "at_once"},
        )
    assert raised.value.status_code == 423
    assert raised.value.code == "response_held"
    body: Any = raised.value.body
    await cast.ann.approve("fetched by id")
    fetched = await cast.sdk.chat.completions.retrieve(body["hold"]["id"])
    assert fetched.choices[0].message.content == "fetched by id"
    assert sum("fetched by id" in str(task) for task in await cast.ann.queue()) == 0


@SQLITE_ONLY
async def test_official_client_fetches_a_held_response_of_the_responses_api(cast: Cast) -> None:
    with pytest.raises(openai.APIStatusError) as raised:
        await cast.sdk.responses.create(
            model="demo-large",
            input=scripted(text="fetched response"),
            metadata={"task": "at_once"},
        )
    body: Any = raised.value.body
    await cast.ann.approve("fetched response")
    fetched = await cast.sdk.responses.retrieve(body["hold"]["id"])
    assert fetched.output_text == "fetched response"


async def test_poll_with_a_wait_returns_as_soon_as_somebody_decides(cast: Cast) -> None:
    held = await cast.ask("chat", "at_once", scripted(text="polled patiently"))
    url = held.json()["error"]["hold"]["url"]
    polling = asyncio.create_task(cast.http.get(url, headers={"prefer": "wait=20"}))
    await cast.ann.approve("polled patiently")
    began_s = time.monotonic()
    assert (await polling).json()["choices"][0]["message"]["content"] == "polled patiently"
    assert time.monotonic() - began_s < 2


async def test_poll_of_what_is_decided_does_not_wait(cast: Cast) -> None:
    held = await cast.ask("chat", "at_once", scripted(text="decided already"))
    await cast.ann.approve("decided already")
    began_s = time.monotonic()
    url = held.json()["error"]["hold"]["url"]
    answers = [await cast.http.get(url, headers={"prefer": "wait=20"}) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200] * 5
    assert time.monotonic() - began_s < 0.4


@SQLITE_ONLY
async def test_poll_ends_with_423_when_its_own_wait_is_over(cast: Cast) -> None:
    held = await cast.ask("chat", "at_once", scripted(text="polled in vain"))
    url = held.json()["error"]["hold"]["url"]
    began_s = time.monotonic()
    answer = await cast.http.get(url, headers={"prefer": "wait=1"})
    assert answer.status_code == 423
    assert 0.9 < time.monotonic() - began_s < 4


async def test_decision_shows_the_state_of_its_review_before_and_after(cast: Cast) -> None:
    held = await cast.ask("chat", "at_once", scripted(text="looked up"))
    url = f"/decisions/{held.headers['x-holdgate-decision']}"
    before = (await cast.http.get(url)).json()
    assert (before["action"], before["review"]["status"]) == ("hold", "held")
    await cast.ann.approve("looked up")
    after = (await cast.http.get(url)).json()
    assert after["review"]["status"] == "approved"
    assert after["review"]["reviewer"] == "ann"
    assert "looked up" not in str(after)


async def test_rejection_after_the_client_left_is_what_the_poll_says(cast: Cast) -> None:
    held = await cast.ask("chat", "at_once", scripted(text="rejected later"))
    task = await cast.ann.task("rejected later")
    await cast.ann.submit(task["id"], "reject", reason="wrong account")
    answer = await cast.http.get(held.json()["error"]["hold"]["url"])
    assert answer.status_code == 403
    assert "wrong account" in answer.json()["error"]["message"]


async def test_hold_of_another_client_is_not_to_be_had(cast: Cast) -> None:
    held = await cast.ask("chat", "at_once", scripted(text="private matter"))
    hold = held.json()["error"]["hold"]
    await cast.ann.approve("private matter")
    for url in (
        hold["url"],
        hold["url"].replace("chat/completions", "responses"),
        f"/decisions/{hold['id']}",
    ):
        answer = await cast.neighbour.get(url)
        assert answer.status_code == 404
        assert "private" not in answer.text


# ---------------------------------------------------------------------------------- how long a client will wait


@pytest.mark.parametrize(
    ("headers", "least_s", "most_s"),
    [
        ({"prefer": "respond-async"}, 0, 1),
        ({"prefer": "wait=0"}, 0, 1),
        ({"prefer": "wait=1"}, 0.9, 4),
        ({"prefer": "respond-async, wait=15"}, 0, 1),
        ({"x-stainless-read-timeout": "2"}, 1.4, 2),
        ({"prefer": "wait=15", "x-stainless-read-timeout": "1"}, 0.7, 1),
    ],
    ids=["async", "wait-0", "wait-1", "async-wins", "sdk-timeout", "the-least-wins"],
)
@SQLITE_ONLY
async def test_client_waits_no_longer_than_it_says(
    cast: Cast, headers: dict[str, str], least_s: float, most_s: float
) -> None:
    prompt = scripted(text="in no hurry")
    began_s = time.monotonic()
    answer = await cast.ask("chat", "held", prompt, headers=headers)
    took_s = time.monotonic() - began_s
    assert answer.status_code == 423
    assert least_s <= took_s < most_s
    for task in await cast.ann.queue():
        await cast.ann.submit(task["id"], "approve")


@SQLITE_ONLY
async def test_stream_with_a_short_wait_ends_with_an_error_that_names_the_hold(cast: Cast) -> None:
    answer = await cast.ask(
        "chat", "held", scripted(text="brief"), stream=True, headers={"prefer": "wait=1"}
    )
    events = events_of(answer.text)
    assert events[-1] == "[DONE]"
    error = orjson.loads(events[0])["error"]
    assert error["code"] == "response_held"
    await cast.ann.approve("brief")
    fetched = await cast.http.get(error["hold"]["url"])
    assert fetched.json()["choices"][0]["message"]["content"] == "brief"


@SQLITE_ONLY
async def test_stream_that_may_not_wait_is_an_ordinary_423(cast: Cast) -> None:
    answer = await cast.ask("chat", "at_once", scripted(text="no wait"), stream=True)
    assert answer.status_code == 423
    assert answer.json()["error"]["code"] == "response_held"
    await cast.ann.approve("no wait")


@pytest.mark.parametrize("endpoint", ENDPOINTS)
@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@SQLITE_ONLY
async def test_placeholder_stands_in_for_the_held_response(
    cast: Cast, endpoint: str, streamed: bool
) -> None:
    said = f"not yet {endpoint} {streamed}"
    answer = await cast.ask(endpoint, "chat_window", scripted(text=said), stream=streamed)
    assert answer.status_code == 200
    assert said not in answer.text
    assert "content_filter" in answer.text
    documents = [orjson.loads(event) for event in events_of(answer.text) if event != "[DONE]"]
    last: dict[str, Any] = documents[-1] if streamed else answer.json()
    shown = last.get("response", last)
    assert shown["holdgate"]["status"] == "held"
    await cast.ann.approve(said)
    fetched = await cast.http.get(shown["holdgate"]["url"])
    assert text_of(endpoint, fetched.json()) == said


@SQLITE_ONLY
async def test_official_client_shows_the_placeholder(cast: Cast) -> None:
    shown = await cast.sdk.chat.completions.create(
        model="demo-large",
        messages=[{"role": "user", "content": scripted(text="for the chat window")}],
        metadata={"task": "chat_window"},
    )
    assert shown.choices[0].finish_reason == "content_filter"
    assert shown.choices[0].message.content is None
    assert "held for review" in (shown.choices[0].message.refusal or "")
    await cast.ann.approve("for the chat window")


# ------------------------------------------------------------------------------------------------- the deadline


@pytest.mark.parametrize("name", ["lapses", "never_released"])
async def test_hold_nobody_decided_is_rejected_and_is_no_ones_decision(
    cast: Cast, name: str
) -> None:
    answer = await cast.ask("chat", name, scripted(text=f"too late for {name}"))
    assert answer.status_code == 403
    error = answer.json()["error"]
    assert error["code"] == "response_rejected"
    assert error["hold"]["status"] == "expired"
    assert "deadline" in error["message"]
    assert f"too late for {name}" not in answer.text
    shown = (await cast.http.get(f"/decisions/{error['hold']['id']}")).json()["review"]
    assert shown["state"] == shown["status"] == "expired"
    assert (shown["reviewer"], shown["verdict"]) == (None, None)
    late = await cast.ann.submit(shown["id"], "approve")
    assert late.status_code == 409
    assert late.json()["error"]["task"]["state"] == "expired"
    again = await cast.http.get(f"/v1/chat/completions/{error['hold']['id']}")
    assert again.status_code == 403


@pytest.mark.parametrize("endpoint", ENDPOINTS)
async def test_released_response_says_that_nobody_reviewed_it(cast: Cast, endpoint: str) -> None:
    answer = await cast.ask(endpoint, "released", scripted(text=f"unreviewed {endpoint}"))
    assert answer.status_code == 200
    assert text_of(endpoint, answer.json()) == f"unreviewed {endpoint}"
    assert "may be revised" in answer.headers["x-holdgate-notice"]
    assert "may be revised" in answer.json()["holdgate"]["notice"]
    shown = (await cast.http.get(f"/decisions/{answer.headers['x-holdgate-decision']}")).json()
    assert (shown["review"]["state"], shown["review"]["reviewer"]) == ("expired", None)


@SQLITE_ONLY
async def test_released_stream_says_that_nobody_reviewed_it(cast: Cast) -> None:
    answer = await cast.ask("chat", "released", scripted(text="unreviewed stream"), stream=True)
    chunks = [orjson.loads(event) for event in events_of(answer.text)[:-1]]
    assert all("may be revised" in chunk["holdgate"]["notice"] for chunk in chunks)


# ------------------------------------------------------------------------------------------------- who decides


async def test_second_decision_gets_the_result_of_the_first(cast: Cast) -> None:
    waiting = asyncio.create_task(cast.ask("chat", "held", scripted(text="decided twice")))
    task = await cast.ann.approve("decided twice")
    second = await cast.ben.submit(task["id"], "reject", reason="too slow")
    assert second.status_code == 409
    first = second.json()["error"]["task"]
    assert (first["verdict"], first["reviewer"], first["state"]) == ("approve", "ann", "resolved")
    assert (await waiting).status_code == 200


async def test_of_two_reviewers_at_once_exactly_one_decides(cast: Cast) -> None:
    waiting = asyncio.create_task(cast.ask("chat", "held", scripted(text="contested")))
    task = await cast.ann.task("contested")
    both = [
        (cast.ann, {"verdict": "approve"}),
        (cast.ben, {"verdict": "correct", "correction": "by ben"}),
    ]
    answers = await asyncio.gather(
        *(who.submit(task["id"], **what) for who, what in both for _ in range(4))
    )
    assert sorted(answer.status_code for answer in answers) == [200, *[409] * 7]
    [won] = [answer.json() for answer in answers if answer.status_code == 200]
    for answer in answers:
        if answer.status_code == 409:
            assert answer.json()["error"]["task"]["reviewer"] == won["reviewer"]
    said = (await waiting).json()["choices"][0]["message"]["content"]
    assert said == {"ann": "contested", "ben": "by ben"}[won["reviewer"]]


async def test_stale_version_is_refused(cast: Cast) -> None:
    waiting = asyncio.create_task(cast.ask("chat", "held", scripted(text="seen long ago")))
    task = await cast.ann.task("seen long ago")
    await cast.ann.http.post(f"/review/{task['id']}/claim")
    stale = await cast.ann.submit(task["id"], "approve", version=task["version"])
    assert stale.status_code == 409
    assert stale.json()["error"]["task"]["verdict"] is None
    fresh = await cast.ann.submit(task["id"], "approve", version=task["version"] + 1)
    assert fresh.status_code == 200
    assert (await waiting).status_code == 200


async def test_claim_keeps_others_off_until_it_is_given_back(cast: Cast) -> None:
    waiting = asyncio.create_task(cast.ask("chat", "held", scripted(text="claimed")))
    task = await cast.ann.task("claimed")
    claimed = await cast.ann.http.post(f"/review/{task['id']}/claim")
    assert (claimed.json()["state"], claimed.json()["claimed_by"]) == ("claimed", "ann")
    assert (await cast.ann.http.post(f"/review/{task['id']}/claim")).status_code == 200
    assert (await cast.ben.http.post(f"/review/{task['id']}/claim")).status_code == 409
    assert (await cast.ben.submit(task["id"], "approve")).status_code == 409
    assert (await cast.ben.http.post(f"/review/{task['id']}/release")).status_code == 409
    assert (await cast.ann.http.post(f"/review/{task['id']}/release")).status_code == 200
    assert (await cast.ben.submit(task["id"], "approve")).status_code == 200
    assert (await waiting).status_code == 200


async def test_claim_lapses_with_its_lease(cast: Cast) -> None:
    await cast.ask("chat", "at_once", scripted(text="left lying"))
    task = await cast.ann.task("left lying")
    lease = await cast.ann.http.post(f"/review/{task['id']}/claim", json={"lease_s": 1})
    assert lease.status_code == 200
    until_ = datetime.fromisoformat(lease.json()["claimed_until"])

    async def claimed_by_ben() -> bool:
        return (await cast.ben.http.post(f"/review/{task['id']}/claim")).status_code == 200

    await until(claimed_by_ben)
    assert datetime.now(UTC) >= until_
    assert (await cast.ann.submit(task["id"], "approve")).status_code == 409
    assert (await cast.ben.submit(task["id"], "approve")).status_code == 200


async def test_decision_on_no_such_task_is_not_found(cast: Cast) -> None:
    assert (await cast.ann.submit("hgt_nothing", "approve")).status_code == 404
    assert (await cast.ann.http.post("/review/hgt_nothing/claim")).status_code == 404


@pytest.mark.parametrize(
    "body",
    [{}, {"verdict": "maybe"}, {"verdict": "approve", "correction": "x"}, {"verdikt": "approve"}],
    ids=["empty", "unknown-verdict", "correction-of-approval", "unknown-key"],
)
@SQLITE_ONLY
async def test_submission_that_makes_no_sense_is_refused_by_name(
    cast: Cast, body: dict[str, str]
) -> None:
    answer = await cast.ann.http.post("/review/hgt_any/submit", json=body)
    assert answer.status_code == 400
    assert any(word in answer.json()["error"]["message"] for word in ("verdict", "correction"))


# ------------------------------------------------------------------------------------- clients that go and come


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
async def test_client_that_leaves_does_not_take_its_hold_with_it(
    cast: Cast, streamed: bool
) -> None:
    marker = f"left behind {streamed}"
    waiting = asyncio.create_task(cast.ask("chat", "held", scripted(text=marker), stream=streamed))
    task = await cast.ann.task(marker)

    async def waiting_clients(count: int) -> bool:
        return bool((await cast.http.get("/readyz")).json()["waiting"] == count)

    await until(lambda: waiting_clients(1))
    waiting.cancel()
    await asyncio.wait([waiting])
    await until(lambda: waiting_clients(0))
    assert (await cast.ann.submit(task["id"], "approve")).status_code == 200
    fetched = await cast.http.get(f"/v1/chat/completions/{task['decision_id']}")
    assert text_of("chat", fetched.json()) == marker


async def test_retry_waits_for_the_hold_of_the_first_try_and_both_are_answered(cast: Cast) -> None:
    prompt = scripted(text="tried twice")
    first = asyncio.create_task(cast.ask("chat", "held", prompt))
    task = await cast.ann.task("tried twice")
    retry = asyncio.create_task(
        cast.ask("chat", "held", prompt, headers={"x-stainless-retry-count": "1"})
    )

    async def both_wait() -> bool:
        return bool((await cast.http.get("/readyz")).json()["waiting"] == 2)

    await until(both_wait)
    await cast.ann.submit(task["id"], "approve")
    answers = [await first, await retry]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert {a.headers["x-holdgate-decision"] for a in answers} == {task["decision_id"]}


@SQLITE_ONLY
async def test_official_client_hears_of_the_hold_before_its_own_timeout_strikes(
    house: House, cast: Cast
) -> None:
    async with official(house.gateway.url, house.keys["app"], timeout=1) as impatient:
        with pytest.raises(openai.APIStatusError) as raised:
            await impatient.chat.completions.create(
                model="demo-large",
                messages=[{"role": "user", "content": scripted(text="impatient")}],
                metadata={"task": "held"},
            )
    assert raised.value.status_code == 423
    [task] = await cast.ann.queue()
    await cast.ann.submit(task["id"], "approve")


# ------------------------------------------------------------------------------------------ processes that stop


@pytest.fixture(params=["sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty store of either kind."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres").new_database())
    return f"sqlite:///{tmp_path / 'restart.db'}"


async def test_kill_9_loses_no_decision_a_client_saw_and_no_hold_a_client_waits_for(
    gateway: GatewayFactory, store_url: str
) -> None:
    server = gateway(POLICIES | PLAIN, store_url=store_url)
    seen: list[tuple[str, str]] = []
    async with caller(server.url) as http, official(server.url, max_retries=30) as sdk:
        waiting = asyncio.create_task(
            sdk.chat.completions.create(
                model="demo-large",
                messages=[{"role": "user", "content": scripted(text="survivor")}],
                metadata={"task": "held"},
            )
        )
        ann = Reviewer(http)
        survivor = await ann.task("survivor")

        async def keep_asking(task: str) -> None:
            body = request("chat", task, scripted(text="on the record"))
            while True:
                answer = await http.post("/v1/chat/completions", json=body)
                seen.append((answer.headers["x-holdgate-decision"], task))

        asking = [asyncio.create_task(keep_asking(t)) for t in ["plain"] * 12 + ["at_once"] * 4]

        async def enough() -> bool:
            return len(seen) > 300

        await until(enough)
        await asyncio.to_thread(server.kill)
        ended = await asyncio.gather(*asking, return_exceptions=True)
        assert all(isinstance(end, httpx.TransportError) for end in ended), ended
        await asyncio.to_thread(server.start)
        for decision, task in seen:
            found = await http.get(f"/decisions/{decision}")
            assert found.status_code == 200, decision
            assert (found.json()["review"] is not None) is (task == "at_once")

        async def retry_waits() -> bool:
            return bool((await http.get("/readyz")).json()["waiting"] == 1)

        await until(retry_waits)
        (await ann.submit(survivor["id"], "approve")).raise_for_status()
        answer = await waiting
    assert answer.choices[0].message.content == "survivor"


async def test_stopping_gateway_answers_everybody_first(gateway: GatewayFactory) -> None:
    server = gateway(POLICIES | PLAIN)
    async with caller(server.url) as http:
        chat = "/v1/chat/completions"
        whole = asyncio.create_task(
            http.post(chat, json=request("chat", "held", scripted(text="whole")))
        )
        streamed = asyncio.create_task(
            http.post(chat, json=request("chat", "held", scripted(text="streamed"), stream=True))
        )
        slow = [
            asyncio.create_task(
                http.post(chat, json=request("chat", task, scripted(text=task, delay_ms=1500)))
            )
            for task in ("other", "held")
        ]

        async def both_wait() -> bool:
            return bool((await http.get("/readyz")).json()["waiting"] == 2)

        await until(both_wait)
        began_s = time.monotonic()
        stopping = asyncio.create_task(asyncio.to_thread(server.stop))
        held = await whole
        assert held.status_code == 423
        ended = events_of((await streamed).text)
        assert orjson.loads(ended[0])["error"]["code"] == "response_held"
        assert ended[1:] == ["[DONE]"]
        assert time.monotonic() - began_s < 1
        finished = [await each for each in slow]
        assert [answer.status_code for answer in finished] == [200, 423]
        assert await stopping in (0, -signal.SIGTERM)
    await asyncio.to_thread(server.start)
    async with caller(server.url) as http:
        ann = Reviewer(http)
        assert len(await ann.queue()) == 3
        await ann.approve("whole")
        fetched = await http.get(held.json()["error"]["hold"]["url"])
        assert fetched.json()["choices"][0]["message"]["content"] == "whole"
        for answer in finished:
            found = await http.get(f"/decisions/{answer.headers['x-holdgate-decision']}")
            assert found.status_code == 200
