"""Providers of other dialects, through litellm; imported only if one is configured."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from difflib import get_close_matches
from functools import partial
from typing import Any

import httpx
import orjson

from gateway.errors import InvalidRequest, NotFound, SettingsError, UpstreamError, UpstreamTimeout
from gateway.ports import UpstreamCall, UpstreamResponse
from gateway.settings import ModelEntry
from validators import JSON

# litellm reads these while it is imported. By default it fetches its price map and its header list
# from the network, loads ./.env, and downloads images that a client names.
os.environ.update(
    LITELLM_LOCAL_MODEL_COST_MAP="True",
    LITELLM_LOCAL_ANTHROPIC_BETA_HEADERS="True",
    LITELLM_MODE="PRODUCTION",
    MAX_IMAGE_URL_DOWNLOAD_SIZE_MB="0",
)

import litellm
from litellm.exceptions import APIConnectionError, Timeout

litellm.suppress_debug_info = True
litellm.disable_hf_tokenizer_download = True

#: What of a body is handed on (OpenAI API reference, "Create chat completion"). Closed, because
#: litellm takes its own settings, addresses and credentials as arguments of the same call.
PARAMETERS = frozenset(
    {
        "audio",
        "frequency_penalty",
        "function_call",
        "functions",
        "logit_bias",
        "logprobs",
        "max_completion_tokens",
        "max_tokens",
        "messages",
        "modalities",
        "n",
        "parallel_tool_calls",
        "prediction",
        "presence_penalty",
        "prompt_cache_key",
        "reasoning_effort",
        "response_format",
        "safety_identifier",
        "seed",
        "service_tier",
        "stop",
        "store",
        "stream",
        "stream_options",
        "temperature",
        "thinking",
        "tool_choice",
        "tools",
        "top_logprobs",
        "top_p",
        "user",
        "verbosity",
        "web_search_options",
    }
)

_MODEL_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:@+-]*(/[A-Za-z0-9_][A-Za-z0-9._:@+-]*)*")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES = {
    "ContextWindowExceededError": "context_length_exceeded",
    "ContentPolicyViolationError": "content_policy_violation",
}
_RELAYED = re.compile(r"retry-after(-ms)?|x-should-retry|x-ratelimit-.+|request-id", re.I)
_JSON = ("content-type", "application/json")
_EVENTS = ("content-type", "text/event-stream")
_NO_ANSWER = (TimeoutError, Timeout, APIConnectionError)
_LONGEST_MESSAGE = 2000


class ProviderUpstream:
    """One of litellm's providers: chat completions of the OpenAI dialect in and out."""

    def __init__(self, entry: ModelEntry, api_key: str | None) -> None:
        """Raise `SettingsError` if litellm has no such provider."""
        known = sorted(str(getattr(name, "value", name)) for name in litellm.provider_list)
        if entry.provider not in known:
            near = get_close_matches(entry.provider, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "see litellm's list of providers"
            raise SettingsError(f"models: there is no provider {entry.provider}; {hint}")
        self._entry = entry
        self._api_key = api_key

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        """See `gateway.ports.Upstream`. A provider's error comes back as a response of its status.

        Raises `NotFound` for any path but `/chat/completions`, `InvalidRequest` for a parameter
        that has no translation.
        """
        if (call.method, call.path) != ("POST", "/chat/completions"):
            raise NotFound(
                f"The provider {self._entry.provider} serves POST /v1/chat/completions only.",
                code="unknown_path",
            )
        arguments = self._arguments(call)
        deadline_s = asyncio.get_running_loop().time() + self._entry.timeout_s.total
        try:
            async with asyncio.timeout_at(deadline_s):
                answer = await litellm.acompletion(**arguments)
        except Exception as error:  # noqa: BLE001 - whatever is raised, the provider has failed
            return _answered(error, self._entry.provider, arguments["api_key"])
        if not isinstance(answer, AsyncIterator):
            return UpstreamResponse(200, [_JSON], _once(orjson.dumps(_as_openai(answer))))
        events = self._events(answer, deadline_s)
        return UpstreamResponse(200, [_EVENTS], events, partial(_close, answer))

    def _arguments(self, call: UpstreamCall) -> dict[str, Any]:
        body = _json_object(call.body)
        # `metadata` tells this gateway about the case; litellm would take it for its own settings.
        unknown = body.keys() - PARAMETERS - {"model", "metadata"}
        if unknown:
            name = min(unknown)
            raise InvalidRequest(
                f"The provider {self._entry.provider} cannot be sent {name[:100]!r}; leave it out.",
                code="unsupported_parameter",
                param=name[:100],
            )
        model = call.model or ""
        if not _MODEL_NAME.fullmatch(model):
            raise InvalidRequest(
                f"{model[:100]!r} is not the name of a model.", code="invalid_model", param="model"
            )
        times = self._entry.timeout_s
        via = [value for name, value in call.headers if name.lower() == "via"]
        return {name: value for name, value in body.items() if name in PARAMETERS} | {
            "model": f"{self._entry.provider}/{model}",
            "api_base": self._entry.base_url,
            "api_key": self._api_key or _bearer(call),
            "timeout": httpx.Timeout(times.read, connect=times.connect),
            "max_retries": 0,
            "num_retries": 0,
            # Says where the call has been (RFC 9110, section 7.6.3), should the address be a gateway again.
            **({"extra_headers": {"via": ", ".join(via)}} if via else {}),
        }

    async def _events(self, chunks: AsyncIterator[Any], deadline_s: float) -> AsyncIterator[bytes]:
        """Write the chunks as server-sent events, ended by `[DONE]`."""
        while True:
            try:
                async with asyncio.timeout_at(deadline_s):
                    chunk = await anext(chunks)
            except StopAsyncIteration:
                break
            except Exception as error:
                raise _broken(error, self._entry.provider) from error
            yield b"data: %b\n\n" % orjson.dumps(_as_openai(chunk))
        yield b"data: [DONE]\n\n"


async def close_connections() -> None:
    """Close what litellm keeps open."""
    await litellm.close_litellm_async_clients()  # type: ignore[attr-defined, no-untyped-call]


async def _close(stream: Any) -> None:
    """End a stream and its connection; some of litellm's iterators do not pass closing on."""
    source = getattr(stream.completion_stream, "streaming_response", None)
    await stream.aclose()
    if isinstance(source, AsyncGenerator):
        await source.aclose()


def _json_object(body: bytes | AsyncIterator[bytes]) -> dict[str, Any]:
    try:
        parsed = orjson.loads(body) if isinstance(body, bytes) else None
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"The body is not JSON: {error}.", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise InvalidRequest("The body is not a JSON object.", code="invalid_json")
    return parsed


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


def _bearer(call: UpstreamCall) -> str | None:
    for name, value in call.headers:
        scheme, _, token = value.partition(" ")
        if name.lower() == "authorization" and scheme.lower() == "bearer":
            return token.strip() or None
    return None


def _as_openai(answer: Any) -> dict[str, JSON]:
    """Write an answer or chunk as OpenAI does: nulls where clients look, usage in its own chunk."""
    body: dict[str, Any] = answer.model_dump(exclude_none=True)
    choices = body.get("choices", [])
    for choice in choices:
        choice.setdefault("finish_reason", None)
        if "message" in choice:
            choice["message"].setdefault("content", None)
    is_chunk = body.get("object") == "chat.completion.chunk"
    if (
        is_chunk
        and "usage" in body
        and not any(c.get("delta") or c["finish_reason"] for c in choices)
    ):
        body["choices"] = []
    return body


def _answered(error: Exception, provider: str, api_key: str | None) -> UpstreamResponse:
    """Turn a provider's error into the response an OpenAI-dialect server would have sent.

    Raises `UpstreamError` or `UpstreamTimeout` if the provider sent no answer that can be used.
    """
    status = getattr(error, "status_code", None)
    headers = getattr(error, "litellm_response_headers", None)
    if headers:
        # litellm rounds some statuses, 529 to 500; the error it translated has the provider's own.
        status = getattr(error.__context__, "status_code", status)
    # Failures of the connection have a status of 5xx too, but no headers.
    statuses = range(400, 600 if headers else 500)
    if isinstance(error, _NO_ANSWER) or not isinstance(status, int) or status not in statuses:
        raise _broken(error, provider) from error
    message = re.sub(r"^(litellm\.\w+: )+", "", str(getattr(error, "message", error)))
    if api_key:
        message = message.replace(api_key, "***")
    body = {
        "message": message[:_LONGEST_MESSAGE],
        "type": _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error"),
        "param": None,
        "code": _CODES.get(type(error).__name__),
    }
    relayed = [
        (name.lower(), value) for name, value in (headers or {}).items() if _RELAYED.fullmatch(name)
    ]
    return UpstreamResponse(status, [_JSON, *relayed], _once(orjson.dumps({"error": body})))


def _broken(error: Exception, provider: str) -> UpstreamError:
    if isinstance(error, TimeoutError | Timeout):
        return UpstreamTimeout(f"The provider {provider} did not answer in time.")
    kind = type(error).__name__
    return UpstreamError(f"The provider {provider} could not be reached, or broke off ({kind}).")
