"""Providers of other dialects, by litellm: a small Anthropic on loopback speaks real HTTP."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from aiohttp import web

from gateway.errors import InvalidRequest, NotFound, SettingsError, UpstreamError, UpstreamTimeout
from gateway.ports import UpstreamCall, UpstreamResponse
from gateway.settings import ModelEntry, Settings
from gateway.upstream.providers import ProviderUpstream, _answered, close_connections
from gateway.upstream.routing import Router
from tests.gateway.loopback import Handler, serving

# Imported on its own, and before our module has set its variables, litellm asks the network.
exceptions = importlib.import_module("litellm.exceptions")

# litellm's types as they meet this version of pydantic.
pytestmark = pytest.mark.filterwarnings("ignore:Item 'summary' on TypedDict:UserWarning")

MESSAGES = [{"role": "user", "content": "hi"}]


class Anthropic:
    """The Messages API as far as one exchange needs it; `error` is a status and headers."""

    def __init__(self, error: tuple[int, dict[str, str]] | None = None) -> None:
        self.error = error
        self.request: dict[str, Any] = {}
        self.headers: dict[str, str] = {}
        self.asked = asyncio.Event()
        self.ended = asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        assert request.path == "/v1/messages"
        self.request = await request.json()
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        if self.error:
            status, headers = self.error
            error = {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}
            return web.json_response(error, status=status, headers=headers)
        if self.request.get("stream"):
            return await self.stream(request)
        message = self.message([{"type": "text", "text": "Hello"}]) | {"stop_reason": "end_turn"}
        return web.json_response(message)

    def message(self, content: list[dict[str, str]]) -> dict[str, Any]:
        usage = {"input_tokens": 3, "output_tokens": 2}
        head = {"id": "msg_1", "type": "message", "role": "assistant", "model": "claude-x"}
        return head | {"content": content, "stop_reason": None, "usage": usage}

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def say(kind: str, **data: Any) -> None:
            body = json.dumps({"type": kind} | data)
            await response.write(f"event: {kind}\ndata: {body}\n\n".encode())

        await say("message_start", message=self.message([]))
        await say("content_block_start", index=0, content_block={"type": "text", "text": ""})
        await say("content_block_delta", index=0, delta={"type": "text_delta", "text": "Hel"})
        self.asked.set()
        try:
            if self.request["messages"][0]["content"] == [{"type": "text", "text": "hang"}]:
                await asyncio.Event().wait()
        finally:
            self.ended.set()
        await say("content_block_delta", index=0, delta={"type": "text_delta", "text": "lo"})
        await say("content_block_stop", index=0)
        delta = {"stop_reason": "end_turn", "stop_sequence": None}
        await say("message_delta", delta=delta, usage={"output_tokens": 2})
        await say("message_stop")
        return response


@asynccontextmanager
async def provider_of(
    handler: Handler, api_key: str | None = "sk-ours", **fields: Any
) -> AsyncIterator[ProviderUpstream]:
    async with serving(handler) as url:
        base = url.removesuffix("/v1")
        entry = ModelEntry(match="*", provider="anthropic", base_url=base, **fields)
        yield ProviderUpstream(entry, api_key)
        await close_connections()


def chat(headers: tuple[tuple[str, str], ...] = (), **body: Any) -> UpstreamCall:
    whole: dict[str, Any] = {"model": "claude-x", "messages": MESSAGES, "max_tokens": 10} | body
    return UpstreamCall(
        "POST", "/chat/completions", json.dumps(whole).encode(), headers, model=whole["model"]
    )


async def read(response: UpstreamResponse) -> Any:
    return json.loads(await response.read(100_000))


async def test_chat_completion_is_translated_both_ways() -> None:
    anthropic = Anthropic()
    async with provider_of(anthropic) as upstream:
        response = await upstream.send(chat(stop=["END"], metadata={"task": "refund"}))
        body = await read(response)
    assert (response.status, response.header("content-type")) == (200, "application/json")
    assert body["object"] == "chat.completion"
    assert body["choices"][0]["message"]["content"] == "Hello"
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["total_tokens"] == 5
    assert anthropic.request["stop_sequences"] == ["END"]
    assert "metadata" not in anthropic.request
    assert anthropic.headers["x-api-key"] == "sk-ours"


async def test_stream_is_server_sent_events_ended_by_done() -> None:
    async with provider_of(Anthropic()) as upstream:
        response = await upstream.send(chat(stream=True, stream_options={"include_usage": True}))
        text = (await response.read(100_000)).decode()
    assert response.header("content-type") == "text/event-stream"
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks[:-1]) == "Hello"
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None, None, "stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 5


async def test_official_client_reads_what_the_provider_said() -> None:
    async with provider_of(Anthropic()) as upstream:

        async def relay(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            answer = await upstream.send(UpstreamCall("POST", "/chat/completions", body, model="m"))
            response = web.StreamResponse(headers=dict(answer.headers))
            await response.prepare(request)
            async for chunk in answer.iter_chunks():
                await response.write(chunk)
            return response

        async with serving(relay) as url, openai.AsyncOpenAI(base_url=url, api_key="x") as client:
            messages: list[Any] = MESSAGES
            whole = await client.chat.completions.create(model="m", messages=messages)
            stream = await client.chat.completions.create(model="m", messages=messages, stream=True)
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert whole.choices[0].message.content == "Hello"
    assert "".join(pieces) == "Hello"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
async def test_clients_key_is_used_if_the_entry_has_none(scheme: str) -> None:
    anthropic = Anthropic()
    async with provider_of(anthropic, api_key=None) as upstream:
        await upstream.send(chat(headers=(("Authorization", f"{scheme} sk-theirs"),)))
    assert anthropic.headers["x-api-key"] == "sk-theirs"


@pytest.mark.parametrize(
    "hostile",
    [
        {"api_base": "http://169.254.169.254"},
        {"base_url": "http://169.254.169.254"},
        {"api_key": "sk-other"},
        {"custom_llm_provider": "openai"},
        {"mock_response": "approved"},
        {"extra_headers": {"x": "y"}},
        {"fallbacks": ["gpt-4o"]},
        {"drop_params": True},
        {"timeout": 0},
        {"n" * 300: 1},
    ],
    ids=lambda body: next(iter(body))[:30],
)
async def test_parameter_of_litellm_itself_is_refused(hostile: dict[str, Any]) -> None:
    anthropic = Anthropic()
    async with provider_of(anthropic) as upstream:
        with pytest.raises(InvalidRequest) as caught:
            await upstream.send(chat(**hostile))
    assert caught.value.code == "unsupported_parameter"
    assert caught.value.param == next(iter(hostile))[:100]
    assert anthropic.request == {}


@pytest.mark.parametrize("model", ["", "../admin", "a//b", "a/../b", "a?b", "a b", "/a", "a\n"])
async def test_name_that_no_model_has_is_refused(model: str) -> None:
    async with provider_of(Anthropic()) as upstream:
        with pytest.raises(InvalidRequest) as caught:
            await upstream.send(chat(model=model))
    assert caught.value.code == "invalid_model"


@pytest.mark.parametrize("body", [b"[]", b"1", b"not json", b""])
async def test_body_that_is_not_an_object_is_refused(body: bytes) -> None:
    async with provider_of(Anthropic()) as upstream:
        with pytest.raises(InvalidRequest) as caught:
            await upstream.send(UpstreamCall("POST", "/chat/completions", body, model="m"))
    assert caught.value.code == "invalid_json"


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/embeddings"), ("GET", "/chat/completions"), ("GET", "/models")]
)
async def test_other_paths_are_not_served(method: str, path: str) -> None:
    async with provider_of(Anthropic()) as upstream:
        with pytest.raises(NotFound, match="anthropic"):
            await upstream.send(UpstreamCall(method, path))


async def test_image_that_a_client_names_is_not_fetched() -> None:
    fetched = []

    async def image(request: web.Request) -> web.Response:
        fetched.append(request.path)
        return web.Response(body=b"png", content_type="image/png")

    async with provider_of(Anthropic()) as upstream, serving(image) as url:
        part = {"type": "image_url", "image_url": {"url": f"{url}/cat.png"}}
        response = await upstream.send(chat(messages=[{"role": "user", "content": [part]}]))
    assert response.status == 400
    assert fetched == []


async def test_providers_error_is_relayed_with_its_status_and_pause() -> None:
    error = (429, {"retry-after": "7", "x-ratelimit-limit": "1", "x-internal": "secret"})
    async with provider_of(Anthropic(error)) as upstream:
        response = await upstream.send(chat())
        body = await read(response)
    assert response.status == 429
    assert response.header("retry-after") == "7"
    assert response.header("x-ratelimit-limit") == "1"
    assert response.header("x-internal") is None
    assert body["error"]["type"] == "rate_limit_error"
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert "slow down" in body["error"]["message"]
    assert not body["error"]["message"].startswith("litellm")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 429, 500, 503, 529])
async def test_every_status_of_the_provider_is_kept(status: int) -> None:
    async with provider_of(Anthropic((status, {}))) as upstream:
        assert (await upstream.send(chat())).status == status


async def test_logprobs_that_the_provider_cannot_give_are_refused_by_name() -> None:
    async with provider_of(Anthropic()) as upstream:
        response = await upstream.send(chat(logprobs=True, top_logprobs=2))
        body = await response.read(10_000)
    assert response.status == 400
    assert b"logprobs" in body


async def test_provider_that_does_not_listen_is_an_upstream_error() -> None:
    async with serving(Anthropic()) as url:
        pass
    entry = ModelEntry(match="*", provider="anthropic", base_url=url)
    with pytest.raises(UpstreamError, match="anthropic") as caught:
        await ProviderUpstream(entry, "sk-secret").send(chat())
    assert caught.value.status == 502
    assert "sk-secret" not in caught.value.message
    await close_connections()


@pytest.mark.parametrize("limit", ["read", "total"])
async def test_provider_that_does_not_answer_in_time_is_a_timeout(limit: str) -> None:
    async def silent(request: web.Request) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    async with provider_of(silent, timeout_s={limit: 0.1}) as upstream:
        with pytest.raises(UpstreamTimeout):
            await upstream.send(chat())


async def test_stream_that_falls_silent_is_a_timeout() -> None:
    async with provider_of(Anthropic(), timeout_s={"total": 0.3}) as upstream:
        messages = [{"role": "user", "content": "hang"}]
        response = await upstream.send(chat(messages=messages, stream=True))
        with pytest.raises(UpstreamTimeout):
            await response.read(100_000)


async def test_closing_a_stream_stops_the_provider() -> None:
    anthropic = Anthropic()
    async with provider_of(anthropic) as upstream:
        messages = [{"role": "user", "content": "hang"}]
        async with await upstream.send(chat(messages=messages, stream=True)) as response:
            await anext(response.iter_chunks())
        await asyncio.wait_for(anthropic.ended.wait(), 5)


async def test_cancelling_the_caller_stops_the_provider() -> None:
    asked, ended = asyncio.Event(), asyncio.Event()

    async def silent(request: web.Request) -> web.StreamResponse:
        asked.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError("unreachable")

    async with provider_of(silent) as upstream:
        task = asyncio.create_task(upstream.send(chat()))
        await asked.wait()
        task.cancel()
        await asyncio.wait_for(ended.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await task


def every_litellm_exception() -> list[Exception]:
    """One of each class, made with whatever its constructor asks for."""
    values: dict[str, Any] = {
        "status_code": 500,
        "current_cost": 1.0,
        "max_budget": 1.0,
        "request_data": {},
        "failures": [{"vector_store_id": "1", "error": "sk-secret"}],
        "response": httpx.Response(422, request=httpx.Request("POST", "https://provider")),
        "headers": None,
    }
    made: list[Exception] = []
    for kind in vars(exceptions).values():
        if not (inspect.isclass(kind) and issubclass(kind, Exception)):
            continue
        if kind.__module__ != "litellm.exceptions":
            continue
        required = [
            name
            for name, parameter in inspect.signature(kind.__init__).parameters.items()
            if name != "self"
            and parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        made.append(kind(**{name: values.get(name, "sk-secret") for name in required}))
    return made


def test_litellm_has_many_exceptions() -> None:
    assert len(every_litellm_exception()) > 20


@pytest.mark.parametrize("error", every_litellm_exception(), ids=lambda error: type(error).__name__)
async def test_every_litellm_exception_becomes_an_answer_or_an_upstream_error(
    error: Exception,
) -> None:
    status = getattr(error, "status_code", 500)
    if status >= 500 or isinstance(error, exceptions.Timeout):
        with pytest.raises(UpstreamError) as caught:
            _answered(error, "anthropic", "sk-secret")
        assert "sk-secret" not in caught.value.message
        late = isinstance(caught.value, UpstreamTimeout)
        assert late == isinstance(error, exceptions.Timeout)
    else:
        response = _answered(error, "anthropic", "sk-secret")
        body = await response.read(10_000)
        assert response.status == status
        assert json.loads(body)["error"]["type"].endswith("_error")
        assert b"sk-secret" not in body


async def test_router_takes_litellm_for_providers_of_other_dialects() -> None:
    anthropic = Anthropic()
    async with serving(anthropic) as url:
        entry = ModelEntry(
            match="small", provider="anthropic", base_url=url.removesuffix("/v1"), rename="claude-x"
        )
        router = Router(Settings(models=(entry,)))
        body = json.dumps({"model": "small", "messages": MESSAGES}).encode()
        headers = [("authorization", "Bearer sk-theirs")]
        call = UpstreamCall("POST", "/chat/completions", body, headers, model="small")
        answer = await read(await router.send(call))
        await router.close()
    assert anthropic.request["model"] == "claude-x"
    assert answer["choices"][0]["message"]["content"] == "Hello"
    assert [(attempt.model, attempt.status) for attempt in call.attempts] == [("claude-x", 200)]


async def test_misspelt_provider_stops_the_start() -> None:
    with pytest.raises(SettingsError, match="did you mean anthropic"):
        Router(Settings(models=(ModelEntry(match="*", provider="antropic"),)))


def test_litellm_is_not_imported_unless_a_provider_needs_it() -> None:
    code = (
        "import asyncio, sys; from gateway.settings import Settings;"
        "from gateway.upstream.routing import Router\n"
        "async def main(): await Router(Settings()).close()\n"
        "asyncio.run(main()); sys.exit('litellm' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=30).returncode == 0


def test_importing_litellm_asks_no_network() -> None:
    code = (
        "import sys; asked = []\n"
        "names = ('socket.getaddrinfo', 'socket.gethostbyname', 'socket.connect')\n"
        "sys.addaudithook(lambda event, args: event in names and asked.append(args))\n"
        "import gateway.upstream.providers\n"
        "sys.exit(repr(asked) if asked else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, timeout=60, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()[-500:]
