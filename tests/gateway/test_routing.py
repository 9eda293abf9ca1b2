"""Which provider a call goes to, how often it is tried, and what is remembered."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from gateway.errors import InvalidRequest, NotFound, UpstreamError, UpstreamTimeout
from gateway.ports import UpstreamCall
from gateway.settings import ModelEntry, Settings, load_settings
from gateway.upstream.routing import LogprobSupport, Router, with_model
from tests.gateway.loopback import serving


class Provider:
    """Answers with the given statuses in turn, the last one for ever; 0 drops the connection."""

    def __init__(self, *statuses: int, headers: dict[str, str] | None = None) -> None:
        self.statuses = list(statuses)
        self.headers = headers or {}
        self.bodies: list[bytes] = []
        self.keys: list[str | None] = []

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.bodies.append(await request.read())
        self.keys.append(request.headers.get("authorization"))
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if status == 0:
            assert request.transport is not None
            request.transport.abort()
        headers = self.headers if status >= 400 else {}
        return web.Response(status=status, headers=headers, body=b"answer")


@asynccontextmanager
async def routed(*entries: dict[str, Any], **providers: Provider) -> AsyncIterator[Router]:
    """A router over `entries`, whose `to` names one of the providers."""
    async with AsyncExitStack() as stack:
        urls = {name: await stack.enter_async_context(serving(p)) for name, p in providers.items()}
        models = tuple(
            ModelEntry(**{k: v for k, v in e.items() if k != "to"}, base_url=urls[e["to"]])
            for e in entries
        )
        router = Router(Settings(models=models))
        stack.push_async_callback(router.close)
        yield router


def ask(model: str | None, body: Any = None, **fields: Any) -> UpstreamCall:
    written = json.dumps({"model": model}).encode() if body is None else body
    return UpstreamCall("POST", "/chat/completions", written, model=model, **fields)


async def answer(router: Router, call: UpstreamCall) -> tuple[int, bytes]:
    async with await router.send(call) as response:
        return response.status, await response.read(1000)


async def test_first_entry_that_matches_gets_the_call() -> None:
    small, rest = Provider(200), Provider(200)
    async with routed(
        {"match": "gpt-*", "to": "small"}, {"match": "*", "to": "rest"}, small=small, rest=rest
    ) as router:
        await answer(router, ask("gpt-4o"))
        await answer(router, ask("claude"))
        await answer(router, ask("gpt-5"))
    assert (len(small.bodies), len(rest.bodies)) == (2, 1)


@pytest.mark.parametrize(("matches", "index"), [(["a", "*", "b"], 1), (["a", "b"], 0)])
async def test_call_without_a_model_goes_to_the_catch_all_or_else_the_first(
    matches: list[str], index: int
) -> None:
    provider = Provider(200)
    entries = [{"match": match, "to": "one"} for match in matches]
    async with routed(*entries, one=provider) as router:
        assert router.entry(None).match == matches[index]
        assert await answer(router, ask(None, b"file")) == (200, b"answer")
    assert provider.bodies == [b"file"]


async def test_unknown_model_is_not_found_and_says_what_exists() -> None:
    async with routed(
        {"match": "gpt-*", "to": "one"}, {"match": "small", "to": "one"}, one=Provider(200)
    ) as router:
        with pytest.raises(NotFound, match=r"'gtp-4o'.*gpt-\*, small") as caught:
            await router.send(ask("gtp-4o"))
    assert (caught.value.status, caught.value.code) == (404, "model_not_found")
    assert caught.value.param == "model"


async def test_unknown_model_of_great_length_is_cut_in_the_message() -> None:
    async with routed({"match": "a", "to": "one"}, one=Provider(200)) as router:
        with pytest.raises(NotFound) as caught:
            await router.send(ask("x" * 10_000))
    assert len(caught.value.message) < 300


async def test_body_is_not_touched_unless_the_model_is_renamed() -> None:
    provider = Provider(200)
    body = b'{"model" : "m",\t"x":1.50e1}'
    async with routed({"match": "*", "to": "one"}, one=provider) as router:
        await answer(router, ask("m", body))
    assert provider.bodies == [body]


async def test_rename_changes_the_model_alone() -> None:
    provider = Provider(200)
    body = b'{"messages":[{"model":"m"}], "model" : "m","x":1.50e1,"big":123456789012345678901}'
    async with routed({"match": "m", "to": "one", "rename": "gpt-4o"}, one=provider) as router:
        call = ask("m", body)
        await answer(router, call)
    expected = (
        b'{"messages":[{"model":"m"}],"model":"gpt-4o","x":1.50e1,"big":123456789012345678901}'
    )
    assert provider.bodies == [expected]
    assert call.attempts[0].model == "gpt-4o"


async def test_rename_to_the_same_name_changes_nothing() -> None:
    provider = Provider(200)
    async with routed({"match": "m", "to": "one", "rename": "m"}, one=provider) as router:
        await answer(router, ask("m", b'{ "model": "m" }'))
    assert provider.bodies == [b'{ "model": "m" }']


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


@given(
    fields=st.dictionaries(st.text(), json_values, max_size=5),
    model=st.text(),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
)
def test_with_model_changes_one_field(
    fields: dict[str, Any], model: str, indent: int | None, ascii_only: bool
) -> None:
    body = json.dumps(fields, indent=indent, ensure_ascii=ascii_only).encode()
    changed = json.loads(with_model(body, model))
    assert changed == fields | {"model": model}
    assert list(changed) == list(fields | {"model": model})


def test_with_model_leaves_one_of_two_models() -> None:
    assert with_model(b'{"model":"a","model":"b"}', "c") == b'{"model":"c"}'


@pytest.mark.parametrize("body", [b"", b"[]", b"--boundary", b'{"model":', b'"model"'])
def test_with_model_refuses_what_is_not_an_object(body: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        with_model(body, "m")
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize("first", [429, 500, 503, 529, 0])
async def test_call_is_retried(first: int) -> None:
    provider = Provider(first, 200, headers={"retry-after-ms": "1"})
    async with routed({"match": "*", "to": "one", "retries": 2}, one=provider) as router:
        call = ask("m")
        assert await answer(router, call) == (200, b"answer")
    assert [attempt.status for attempt in call.attempts] == [first or None, 200]
    assert [attempt.error for attempt in call.attempts] == [
        None if first else "upstream_error",
        None,
    ]
    assert all(attempt.ms >= 0 for attempt in call.attempts)


@pytest.mark.parametrize("status", [200, 302, 400, 401, 404, 409, 422])
async def test_other_answers_are_not_retried(status: int) -> None:
    provider = Provider(status)
    async with routed({"match": "*", "to": "one", "retries": 2}, one=provider) as router:
        assert (await answer(router, ask("m")))[0] == status
    assert len(provider.bodies) == 1


async def test_nothing_is_retried_by_default() -> None:
    provider = Provider(500)
    async with routed({"match": "*", "to": "one"}, one=provider) as router:
        assert (await answer(router, ask("m")))[0] == 500
    assert len(provider.bodies) == 1


async def test_last_answer_is_relayed_when_every_try_failed() -> None:
    provider = Provider(500, 503, 429, headers={"retry-after": "0"})
    async with routed({"match": "*", "to": "one", "retries": 2}, one=provider) as router:
        call = ask("m")
        assert await answer(router, call) == (429, b"answer")
    assert [attempt.status for attempt in call.attempts] == [500, 503, 429]


async def test_last_error_is_raised_when_every_try_failed() -> None:
    provider = Provider(503, 0, headers={"retry-after-ms": "1"})
    async with routed({"match": "*", "to": "one", "retries": 1}, one=provider) as router:
        call = ask("m")
        with pytest.raises(UpstreamError):
            await router.send(call)
    assert [attempt.error for attempt in call.attempts] == [None, "upstream_error"]


async def test_timeout_is_not_retried() -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async with serving(silent) as url:
        entry = {"match": "*", "base_url": url, "retries": 3, "timeout_s": {"read": 0.05}}
        router = Router(Settings.model_validate({"models": [entry]}))
        call = ask("m")
        with pytest.raises(UpstreamTimeout):
            await router.send(call)
        await router.close()
    assert [attempt.error for attempt in call.attempts] == ["upstream_timeout"]


async def test_streamed_body_is_sent_once_only() -> None:
    async def upload() -> AsyncIterator[bytes]:
        yield b"abc"

    down, spare = Provider(503, headers={"retry-after-ms": "1"}), Provider(200)
    async with routed(
        {"match": "m", "to": "down", "retries": 3, "fallbacks": ["spare"]},
        {"match": "spare", "to": "spare"},
        down=down,
        spare=spare,
    ) as router:
        assert (await answer(router, ask("m", upload())))[0] == 503
    assert (down.bodies, spare.bodies) == ([b"abc"], [])


@pytest.mark.parametrize(
    ("headers", "least_s"),
    [
        ({"retry-after-ms": "150"}, 0.15),
        ({"retry-after-ms": "150", "retry-after": "3600"}, 0.15),
        ({"retry-after": "0.15"}, 0.15),
        ({"retry-after": format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)}, 0),
        ({"retry-after": "Fri, 13 Nov 2020 10:00:00"}, 0),
    ],
    ids=["milliseconds", "milliseconds first", "seconds", "date", "date without zone"],
)
async def test_pause_asked_for_is_kept(headers: dict[str, str], least_s: float) -> None:
    provider = Provider(429, 200, headers=headers)
    async with routed({"match": "*", "to": "one", "retries": 1}, one=provider) as router:
        began_s = time.monotonic()
        assert (await answer(router, ask("m")))[0] == 200
        took_s = time.monotonic() - began_s
    assert took_s >= least_s


@pytest.mark.parametrize(
    "headers",
    [
        {"retry-after": "3600"},
        {"retry-after-ms": "999999999"},
        {"retry-after": "Wed, 01 Jan 2200 00:00:00 GMT"},
        {"x-should-retry": "false"},
    ],
    ids=["seconds", "milliseconds", "date", "told not to"],
)
async def test_provider_that_asks_for_long_or_no_retry_is_left_in_peace(
    headers: dict[str, str],
) -> None:
    provider = Provider(429, headers=headers)
    async with routed({"match": "*", "to": "one", "retries": 5}, one=provider) as router:
        assert (await answer(router, ask("m")))[0] == 429
    assert len(provider.bodies) == 1


@pytest.mark.parametrize("status", [429, 500, 0])
async def test_fallbacks_are_tried_in_order(status: int) -> None:
    down, worse, good = Provider(status), Provider(500), Provider(200)
    async with routed(
        {"match": "m", "to": "down", "fallbacks": ["worse", "good", "never"]},
        {"match": "worse", "to": "worse", "fallbacks": ["never"]},
        {"match": "good", "to": "good", "rename": "gpt-4o"},
        {"match": "never", "to": "never"},
        down=down,
        worse=worse,
        good=good,
        never=(never := Provider(200)),
    ) as router:
        call = ask("m", b'{"model":"m","n":1}')
        assert await answer(router, call) == (200, b"answer")
    assert worse.bodies == [b'{"model":"worse","n":1}']
    assert good.bodies == [b'{"model":"gpt-4o","n":1}']
    assert never.bodies == []
    assert [attempt.model for attempt in call.attempts] == ["m", "worse", "gpt-4o"]
    assert [attempt.status for attempt in call.attempts] == [status or None, 500, 200]


@pytest.mark.parametrize("status", [200, 400, 404])
async def test_answer_of_the_model_asked_for_needs_no_fallback(status: int) -> None:
    spare = Provider(200)
    async with routed(
        {"match": "m", "to": "one", "fallbacks": ["spare"]},
        {"match": "spare", "to": "spare"},
        one=Provider(status),
        spare=spare,
    ) as router:
        assert (await answer(router, ask("m")))[0] == status
    assert spare.bodies == []


async def test_last_fallbacks_outcome_is_the_answer() -> None:
    async with routed(
        {"match": "m", "to": "one", "fallbacks": ["spare"]},
        {"match": "spare", "to": "spare"},
        one=Provider(503),
        spare=Provider(429, headers={"retry-after": "7"}),
    ) as router:
        response = await router.send(ask("m"))
        assert (response.status, response.header("retry-after")) == (429, "7")
        await response.close()


async def test_clients_key_never_goes_to_a_fallback() -> None:
    one, spare = Provider(503), Provider(200)
    async with routed(
        {"match": "m", "to": "one", "fallbacks": ["spare"]},
        {"match": "spare", "to": "spare"},
        one=one,
        spare=spare,
    ) as router:
        await answer(router, ask("m", headers=[("Authorization", "Bearer theirs")]))
    assert (one.keys, spare.keys) == (["Bearer theirs"], [None])


async def test_key_of_the_entry_is_read_from_its_variable(tmp_path: Path) -> None:
    provider = Provider(200)
    async with serving(provider) as url:
        config = tmp_path / "holdgate.yaml"
        entry = {"match": "*", "base_url": url, "api_key_env": "MY_KEY"}
        with config.open("w") as file:
            YAML().dump({"models": [entry]}, file)
        router = Router(load_settings(config, {"MY_KEY": "sk-1"}))
        await answer(router, ask("m", headers=[("authorization", "Bearer theirs")]))
        await router.close()
    assert provider.keys == ["Bearer sk-1"]


@pytest.mark.parametrize(
    ("matches", "listed"), [(["*"], None), (["gpt-*"], None), (["a", "gpt-*", "b"], ["a", "b"])]
)
async def test_models_of_exact_name_are_listed(
    matches: Sequence[str], listed: list[str] | None
) -> None:
    entries = [{"match": match, "to": "one"} for match in matches]
    async with routed(*entries, one=Provider(200)) as router:
        body = router.list_models()
    if listed is None:
        assert body is None
    else:
        assert body is not None
        models = json.loads(body)
        assert models["object"] == "list"
        assert [model["id"] for model in models["data"]] == listed
        assert {model["object"] for model in models["data"]} == {"model"}


class HandClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


REFUSAL = b'{"error":{"message":"You are not allowed to request logprobs from this model"}}'


@pytest.mark.parametrize("status", [400, 403, 422])
def test_refusal_of_logprobs_is_remembered_for_a_while(status: int) -> None:
    clock = HandClock()
    support = LogprobSupport(clock, keep_s=600)
    assert support.learn("o1", status, REFUSAL)
    assert support.is_refused("o1")
    assert not support.is_refused("gpt-4o")
    clock.now_s = 601
    assert not support.is_refused("o1")


@pytest.mark.parametrize(
    ("status", "body"), [(200, REFUSAL), (500, REFUSAL), (429, REFUSAL), (400, b'{"error":"n"}')]
)
def test_other_answers_are_no_refusal_of_logprobs(status: int, body: bytes) -> None:
    support = LogprobSupport(HandClock())
    assert not support.learn("m", status, body)
    assert not support.is_refused("m")


def test_memory_of_refusals_is_bounded() -> None:
    support = LogprobSupport(HandClock(), capacity=3)
    for model in ("a", "b", "c", "a", "d"):
        support.learn(model, 400, REFUSAL)
    assert [model for model in "abcd" if support.is_refused(model)] == ["a", "c", "d"]


async def test_logprobs_are_asked_for_as_the_entry_says() -> None:
    async with routed(
        {"match": "auto", "to": "one", "max_top_logprobs": 3},
        {"match": "yes", "to": "one", "logprobs": "yes"},
        {"match": "no", "to": "one", "logprobs": "no"},
        one=Provider(200),
    ) as router:
        assert [router.top_logprobs(model) for model in ("auto", "yes", "no")] == [3, 5, None]
        assert all(router.refuses_logprobs(model, 400, REFUSAL) for model in ("auto", "yes"))
        assert [router.top_logprobs(model) for model in ("auto", "yes")] == [None, 5]
