"""Which provider serves which model: routes, retries, fallbacks, and what a model cannot do."""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from fnmatch import fnmatchcase
from functools import partial

import msgspec
import orjson
from msgspec.structs import replace
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    retry_if_result,
    wait_exponential_jitter,
)

from gateway.errors import InvalidRequest, NotFound, UpstreamError, UpstreamTimeout
from gateway.ports import Attempt, Upstream, UpstreamCall, UpstreamResponse
from gateway.settings import ModelEntry, Settings
from gateway.upstream.direct import DirectUpstream, open_session

#: A provider that asks for a longer pause is not asked again; the caller is told, and decides.
LONGEST_PAUSE_S = 20.0
LONGEST_RETRYING_S = 60.0
#: How often at least a call of our own is tried again: unlike a client's, nobody else repeats it.
OWN_RETRIES = 2

_NUMBER = re.compile(r"\d{1,9}(\.\d{1,9})?")
_BACKOFF = wait_exponential_jitter(multiplier=0.5, max=8)


class Router:
    """Sends each call to the provider that the settings name for its model."""

    def __init__(self, settings: Settings) -> None:
        """Open the connection pool, and load litellm if a provider needs it.

        Must be called on the event loop. Raises `SettingsError` for an unknown provider.
        """
        self._entries = settings.models
        self._logprobs = LogprobSupport()
        self._open = AsyncExitStack()
        keys = [settings.secret(entry.api_key_env) for entry in self._entries]
        providers = [self._provider(*pair) for pair in zip(self._entries, keys, strict=True)]
        session = open_session()
        self._open.push_async_callback(session.close)
        self._upstreams = [
            provider or DirectUpstream(session, entry, key)
            for provider, entry, key in zip(providers, self._entries, keys, strict=True)
        ]

    def _provider(self, entry: ModelEntry, api_key: str | None) -> Upstream | None:
        if entry.provider == "openai":
            return None
        from gateway.upstream import providers  # noqa: PLC0415 - 3 s and 150 MB, for who needs it

        self._open.push_async_callback(providers.close_connections)
        return providers.ProviderUpstream(entry, api_key)

    def entry(self, model: str | None) -> ModelEntry:
        """Return the first entry that matches; without a model the first catch-all, else the first.

        Raises `NotFound` with `code: model_not_found`, saying what exists.
        """
        return self._entries[self._index(model)]

    def _index(self, model: str | None) -> int:
        for index, entry in enumerate(self._entries):
            if entry.match == "*" if model is None else fnmatchcase(model, entry.match):
                return index
        if model is None:
            return 0
        known = ", ".join(entry.match for entry in self._entries[:20])
        raise NotFound(
            f"The model {model[:100]!r} is not served here. Configured are: {known}.",
            code="model_not_found",
            param="model",
        )

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        """See `gateway.ports.Upstream`. Retries and falls back while no byte has been relayed.

        When every try fails, the outcome of the last one is the answer. A body that is a stream is
        sent once only.
        """
        entry = self.entry(call.model)
        replaceable = isinstance(call.body, bytes) and call.patience_s is None
        names = (call.model, *(entry.fallbacks if replaceable else ()))
        for name in names[:-1]:
            with suppress(UpstreamError):
                response = await self._send_to(name, call)
                if not _is_retryable(response):
                    return response
                await response.close()
        return await self._send_to(names[-1], call)

    async def _send_to(self, name: str | None, call: UpstreamCall) -> UpstreamResponse:
        index = self._index(name)
        entry, upstream = self._entries[index], self._upstreams[index]
        addressed = _addressed(call, name, entry)
        retries, patience_s = entry.retries, LONGEST_RETRYING_S
        if call.patience_s is not None:
            retries, patience_s = max(retries, OWN_RETRIES), min(call.patience_s, patience_s)
        if not retries or not isinstance(call.body, bytes):
            return await _attempt(upstream, addressed)
        retrying = AsyncRetrying(
            retry=retry_if_result(_is_retryable) | retry_if_exception(_is_connection_error),
            stop=partial(_is_over, retries, patience_s),
            wait=_pause_s,
            before_sleep=_discard,
            retry_error_callback=_last_outcome,
        )
        return await retrying(_attempt, upstream, addressed)

    def list_models(self) -> bytes | None:
        """See `gateway.ports.Models`. None if no entry names one model exactly."""
        exact = [entry for entry in self._entries if entry.is_exact]
        if not exact:
            return None
        models = [
            {"id": e.match, "object": "model", "created": 0, "owned_by": e.provider} for e in exact
        ]
        return orjson.dumps({"object": "list", "data": models})

    def top_logprobs(self, model: str) -> int | None:
        """See `gateway.ports.Models`."""
        entry = self.entry(model)
        if entry.logprobs == "no" or (
            entry.logprobs == "auto" and self._logprobs.is_refused(model)
        ):
            return None
        return entry.max_top_logprobs

    def refuses_logprobs(self, model: str, status: int, body: bytes) -> bool:
        """See `gateway.ports.Models`."""
        return self._logprobs.learn(model, status, body)

    async def close(self) -> None:
        """Close every connection."""
        await self._open.aclose()


class LogprobSupport:
    """Which models refused logprobs lately: within `keep_s` seconds, at most `capacity` of them."""

    def __init__(
        self,
        clock_s: Callable[[], float] = time.monotonic,
        *,
        keep_s: float = 600,
        capacity: int = 1000,
    ) -> None:
        self._clock_s = clock_s
        self._keep_s = keep_s
        self._capacity = capacity
        self._refused_at: OrderedDict[str, float] = OrderedDict()

    def is_refused(self, model: str) -> bool:
        """Whether the model refused within the last `keep_s` seconds."""
        at = self._refused_at.get(model)
        return at is not None and self._clock_s() - at < self._keep_s

    def learn(self, model: str, status: int, body: bytes) -> bool:
        """Remember a refusal; return whether it is one: a client error that names logprobs."""
        if status not in (400, 403, 422) or b"logprobs" not in body:
            return False
        self._refused_at[model] = self._clock_s()
        self._refused_at.move_to_end(model)
        if len(self._refused_at) > self._capacity:
            self._refused_at.popitem(last=False)
        return True


def with_model(body: bytes, model: str) -> bytes:
    """Give a JSON object another `model`; every other value keeps its bytes.

    Raises
    ------
    InvalidRequest
        If the body is not a JSON object.
    """
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as error:
        raise InvalidRequest(
            f"The body is not a JSON object: {error}.", code="invalid_json"
        ) from error
    return msgspec.json.encode(fields | {"model": msgspec.Raw(msgspec.json.encode(model))})


def _addressed(call: UpstreamCall, name: str | None, entry: ModelEntry) -> UpstreamCall:
    """Address a call to one provider, which gets the client's key only if the client chose it."""
    sent = entry.rename or name
    if sent in (None, call.model) and name == call.model:
        return call
    if call.model is None or not isinstance(call.body, bytes) or sent is None:
        return call
    headers = call.headers
    if name != call.model:
        headers = [(key, value) for key, value in headers if key.lower() != "authorization"]
    body = with_model(call.body, sent) if call.body and sent != call.model else call.body
    return replace(call, model=sent, headers=headers, body=body)


async def _attempt(upstream: Upstream, call: UpstreamCall) -> UpstreamResponse:
    started_s = time.monotonic()
    status, code = None, None
    try:
        response = await upstream.send(call)
        status = response.status
    except UpstreamError as error:
        code = error.code
        raise
    else:
        return response
    finally:
        call.attempts.append(
            Attempt(call.model, status, code, (time.monotonic() - started_s) * 1000)
        )


def _is_retryable(response: UpstreamResponse) -> bool:
    return (response.status == 429 or response.status >= 500) and response.header(
        "x-should-retry"
    ) != "false"


def _is_connection_error(error: BaseException) -> bool:
    """Say whether to ask the same provider again; one that used up its time gets no more."""
    return isinstance(error, UpstreamError) and not isinstance(error, UpstreamTimeout)


def _response_of(state: RetryCallState) -> UpstreamResponse | None:
    outcome = state.outcome
    return None if outcome is None or outcome.failed else outcome.result()


def _retry_after_s(response: UpstreamResponse | None) -> float | None:
    """Read the pause asked for: RFC 9110 section 10.2.3, and OpenAI's `retry-after-ms`."""
    if response is None:
        return None
    if _NUMBER.fullmatch(milliseconds := response.header("retry-after-ms") or ""):
        return float(milliseconds) / 1000
    after = response.header("retry-after") or ""
    if _NUMBER.fullmatch(after):
        return float(after)
    try:
        return max(0.0, (parsedate_to_datetime(after) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return None


def _is_over(retries: int, patience_s: float, state: RetryCallState) -> bool:
    return (
        state.attempt_number > retries
        or state.upcoming_sleep > LONGEST_PAUSE_S
        or (state.seconds_since_start or 0.0) + state.upcoming_sleep > patience_s
    )


def _pause_s(state: RetryCallState) -> float:
    asked = _retry_after_s(_response_of(state))
    return _BACKOFF(state) if asked is None else asked


async def _discard(state: RetryCallState) -> None:
    if response := _response_of(state):
        await response.close()


def _last_outcome(state: RetryCallState) -> UpstreamResponse:
    if state.outcome is None:
        raise AssertionError("tenacity gives up only after a try")
    response: UpstreamResponse = state.outcome.result()
    return response
