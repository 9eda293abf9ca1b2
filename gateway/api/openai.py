"""Everything under /v1: the OpenAI dialect, checked where a policy applies and passed through elsewhere.

A raw ASGI application, because requests and responses are bytes that must not be touched without need.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Coroutine

import orjson
from starlette.types import Receive, Scope, Send

from gateway import logs, sse, wire
from gateway.api.asgi import Exchange, let_go
from gateway.auth import Caller
from gateway.calls import Call, Headers, Held, Patience, Reply, make_call, relayed
from gateway.errors import (
    Forbidden,
    GatewayError,
    InvalidRequest,
    NotFound,
    UpstreamError,
)
from gateway.interviews import is_from_judge
from gateway.labels import read_feedback
from gateway.ports import UpstreamCall
from gateway.recording import new_id
from gateway.records import DecisionRecord, Role
from gateway.services import Services
from policies import Action, Match

#: Paths that name one response: `/chat/completions/{id}`, `/responses/{id}/input_items`, ...
_STORED = re.compile(r"/(?:chat/completions|responses)/([^/]+)(/[a-z_]+)?", re.IGNORECASE)


class OpenAIEdge:
    """The ASGI application under /v1."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; every error has the OpenAI shape."""
        services = self._services
        exchange = Exchange(
            scope, receive, send, limit_bytes=services.settings.limits.request_bytes
        )
        exchange.id = new_id("hgd", services.clock.now())
        try:
            await self._route(exchange)
        except GatewayError as error:
            services.metrics.errors.labels(error.code).inc()
            await exchange.respond(_error_reply(exchange, error))
        except asyncio.CancelledError:
            if not exchange.gone:
                raise
        except Exception as error:
            if exchange.gone:
                return
            logs.error("unexpected_error", error, request_id=exchange.id)
            if exchange.started:
                raise
            unexpected = GatewayError("Something went wrong in the gateway; its log says what.")
            await exchange.respond(_error_reply(exchange, unexpected))

    async def _route(self, exchange: Exchange) -> None:
        services = self._services
        caller = await services.authenticator.caller(
            exchange.values.get("authorization"),
            origin=exchange.values.get("origin"),
            host=exchange.values.get("host", ""),
        )
        caller.require(Role.CLIENT)
        path = exchange.path
        if path == "/feedback":
            await self._feedback(exchange, caller)
            return
        endpoint = wire.CHECKED_PATHS.get(path.lower())
        if endpoint is not None and exchange.method == "POST":
            await self._checked(exchange, caller, endpoint)
        elif endpoint is not None and exchange.has_body:
            raise InvalidRequest(
                f"{exchange.method} with a body is not known at {path}; use POST.",
                code="method_not_allowed",
            )
        elif endpoint is not None and exchange.method == "GET":
            await self._list(exchange, caller)
        elif (stored := _STORED.fullmatch(path)) and (record := await self._decided(stored[1])):
            await self._stored(
                exchange, caller, record, is_ours=stored[1] == record.id, below=stored[2]
            )
        elif (
            path == "/models"
            and exchange.method == "GET"
            and (listed := services.models.list_models())
        ):
            await exchange.respond(Reply(200, [("content-type", "application/json")], listed))
        else:
            await self._pass_through(exchange, caller)

    # -------------------------------------------------------------------------------------------------- checked

    async def _checked(self, exchange: Exchange, caller: Caller, endpoint: str) -> None:
        services = self._services
        if is_from_judge(exchange.headers):
            raise Forbidden(
                "This is a judge's question, and a judge is not judged: let the judge's model have the address of its "
                "provider, not of a gateway.",
                code="judge_refused",
            )
        call = make_call(
            decision_id=exchange.id,
            endpoint=endpoint,
            body=await exchange.body(),
            query=exchange.query,
            headers=_forwarded(exchange.headers, caller),
            caller=caller,
            received_s=services.clock.monotonic_s(),
        )
        match = services.policies.current.select(call.facts)
        if match is None:
            await self._pass_through(
                exchange, caller, body=call.body, model=call.facts.model, why="no_policy"
            )
            return
        if endpoint == wire.RESPONSES and call.request.get("background") is True:
            raise InvalidRequest(
                "`background: true` is not supported under a policy: its result could not be checked. Leave it out.",
                code="background_unsupported",
                param="background",
            )
        opening = [("x-request-id", call.request_id), ("x-holdgate-policy", match.policy.label)]
        is_streamed = call.streamed
        answering = self._answer(call, match)
        # A client may wait for hours from here on: what it sent must not stay in memory for that long.
        del call, match
        exchange.headers, exchange.values = [], {}
        if is_streamed:
            await self._streamed(exchange, endpoint, opening, answering)
        else:
            await exchange.respond(await answering)

    async def _answer(self, call: Call, match: Match) -> Reply:
        reply = await self._services.pipeline.answer(call, match)
        del call, match
        return await self._services.delivery.of(reply) if isinstance(reply, Held) else reply

    async def _streamed(
        self,
        exchange: Exchange,
        endpoint: str,
        opening: Headers,
        answering: Coroutine[None, None, Reply],
    ) -> None:
        """Send the reply as soon as there is one; if that takes long, open the stream and keep it alive with comments."""
        waiting: asyncio.Task[None] | None = None

        def keep_waiting() -> None:
            nonlocal waiting
            waiting = asyncio.create_task(self._keep_alive(exchange, opening))

        keepalive_s = self._services.settings.hold.keepalive_s
        timer = asyncio.get_running_loop().call_later(keepalive_s, keep_waiting)
        try:
            reply = await answering
        except GatewayError as error:
            if not exchange.started:
                raise
            reply = Reply(200, [], sse.error_events(endpoint, error))
        finally:
            timer.cancel()
            if waiting is not None:
                waiting.cancel()
        try:
            if waiting is not None:
                await asyncio.wait([waiting])
            if exchange.started:
                await exchange.send_parts(_late(endpoint, reply))
            else:
                await exchange.respond(reply)
        finally:
            await let_go(reply)

    async def _keep_alive(self, exchange: Exchange, opening: Headers) -> None:
        event_stream = ("content-type", "text/event-stream; charset=utf-8")
        decision = ("x-holdgate-decision", exchange.id)
        await exchange.start(200, [event_stream, decision, *opening])
        while True:
            await exchange.send(sse.comment("checking"), more=True)
            await asyncio.sleep(self._services.settings.hold.keepalive_s)

    # ---------------------------------------------------------------------------------------- what is kept here

    async def _decided(self, name: str) -> DecisionRecord | None:
        """The decision that an id in a path names: ours, or the provider's id of a response we decided on."""
        store = self._services.store
        return await (
            store.decision(name) if name.startswith("hgd_") else store.decision_by_upstream_id(name)
        )

    async def _stored(
        self,
        exchange: Exchange,
        caller: Caller,
        record: DecisionRecord,
        *,
        is_ours: bool,
        below: str | None,
    ) -> None:
        """Answer for a response of ours; nor is the provider's copy to be had where its client did not get it as it was."""
        if not is_ours and not _differs(record):
            await self._pass_through(exchange, caller)
            return
        if caller.role is Role.CLIENT and caller.key and record.key_id != caller.key.id:
            raise NotFound(f"There is no response {record.id}.")
        if exchange.method != "GET" or below:
            raise InvalidRequest(
                "Of this response only the response itself is kept, to be read.",
                code="not_supported",
            )
        exchange.watch()
        wait_s = Patience.of(exchange.values).wait_s or 0.0
        await exchange.respond(await self._services.delivery.poll(record, wait_s=wait_s))

    async def _feedback(self, exchange: Exchange, caller: Caller) -> None:
        """Store what an application says of a response of its own; saying the same again changes nothing."""
        if exchange.method != "POST":
            raise InvalidRequest("Feedback is given by POST.", code="method_not_allowed")
        services, given = self._services, read_feedback(await exchange.body())
        record = await self._decided(given.id)
        own = caller.role is not Role.CLIENT or (
            record is not None and caller.key is not None and record.key_id == caller.key.id
        )
        if record is None or not own:
            raise NotFound(f"There is no response {given.id}.")
        label = given.label(record.id, caller.name, services.clock.now())
        is_new = bool(await services.store.label([label]))
        told = {
            "object": "feedback",
            "decision": record.id,
            "acceptable": given.acceptable,
            "stored": is_new,
        }
        headers = [("content-type", "application/json"), ("x-request-id", exchange.id)]
        await exchange.respond(Reply(200, headers, orjson.dumps(told)))

    async def _list(self, exchange: Exchange, caller: Caller) -> None:
        """List what the provider stored, without what its client did not get as it was."""
        self._allow_unchecked(exchange)
        exchange.watch()
        call = UpstreamCall(
            "GET",
            exchange.raw_path,
            headers=_forwarded(exchange.headers, caller),
            query=exchange.query,
            readable=True,
        )
        response = await self._services.models.send(call)
        body = await response.read(self._services.settings.limits.response_bytes)
        if 200 <= response.status < 300:
            body = await self._without_withheld(body)
        headers = [*relayed(response.headers), *_unchecked(exchange)]
        await exchange.respond(Reply(response.status, headers, body))

    async def _without_withheld(self, body: bytes) -> bytes:
        try:
            listed = orjson.loads(body)
            decided = [await self._decided(str(item["id"])) for item in listed["data"]]
        except (ValueError, TypeError, KeyError) as error:
            raise UpstreamError("The provider's list is not a list of completions.") from error
        kept = [
            item
            for item, record in zip(listed["data"], decided, strict=True)
            if record is None or not _differs(record)
        ]
        return body if len(kept) == len(decided) else orjson.dumps({**listed, "data": kept})

    # ------------------------------------------------------------------------------------------------ unchecked

    async def _pass_through(
        self,
        exchange: Exchange,
        caller: Caller,
        *,
        body: bytes | None = None,
        model: str | None = None,
        why: str = "path",
    ) -> None:
        """Let a request and its response through untouched and unbuffered, and say that nothing was checked."""
        services = self._services
        self._allow_unchecked(exchange, why)
        if body is None and not exchange.has_body:
            body = b""
            exchange.watch()
        call = UpstreamCall(
            exchange.method,
            exchange.raw_path,
            body=exchange.stream() if body is None else body,
            headers=_forwarded(exchange.headers, caller),
            query=exchange.query,
            model=model,
        )
        async with await services.models.send(call) as response:
            lengths = [(n, v) for n, v in response.headers if n == "content-length"]
            headers = [*relayed(response.headers), *lengths, *_unchecked(exchange)]
            await exchange.respond(Reply(response.status, headers, response.iter_chunks()))

    def _allow_unchecked(self, exchange: Exchange, why: str = "path") -> None:
        """Raise `Forbidden` unless `passthrough` allows the path; if it does, count it."""
        if not self._services.settings.passthrough.allows(exchange.path):
            raise Forbidden(
                f"Policies cannot be enforced on {exchange.path}, and `passthrough` in holdgate.yaml refuses it.",
                code="path_refused",
            )
        self._services.metrics.unchecked.labels(why).inc()


def _unchecked(exchange: Exchange) -> Headers:
    """What a client is told of an answer that no policy looked at."""
    return [("x-request-id", exchange.id), ("x-holdgate-action", "passthrough")]


def _differs(record: DecisionRecord) -> bool:
    """Whether what the provider keeps is not what the client got: held, blocked, corrected or redacted."""
    decision = record.detail.get("decision")
    redacted = isinstance(decision, dict) and decision.get("redactions")
    return record.action in (Action.HOLD, Action.BLOCK) or bool(redacted)


def _forwarded(headers: Headers, caller: Caller) -> Headers:
    """The client's headers for the provider: a key of ours is no business of theirs."""
    if caller.key is None:
        return headers
    return [(name, value) for name, value in headers if name != "authorization"]


def _error_reply(exchange: Exchange, error: GatewayError) -> Reply:
    headers = {"x-request-id": exchange.id, **error.headers, "content-type": "application/json"}
    return Reply(error.status, list(headers.items()), error.body())


def _late(endpoint: str, reply: Reply) -> AsyncIterator[bytes] | bytes:
    """The rest of a stream that was opened before there was a reply."""
    if isinstance(reply.body, bytes) and not 200 <= reply.status < 300:
        return sse.error_events(endpoint, _as_error(reply.status, reply.body))
    return reply.body


def _as_error(status: int, body: bytes) -> GatewayError:
    """The provider's error as one of ours, with all that it says."""
    told = f"The provider answered {status}"
    try:
        said = dict(orjson.loads(body)["error"])
        error = UpstreamError(f"{told}: {said['message']}", extra={**said, "status": status})
    except (ValueError, TypeError, KeyError):
        return UpstreamError(f"{told}: {body[:2000].decode(errors='replace')}")
    error.code = str(said.get("code") or said.get("type") or error.code)
    return error
