"""The scripted upstream's HTTP side: routes, sending, and the log of calls that tests read."""

from __future__ import annotations

import asyncio
import base64
import functools
import hashlib
import math
import re
import signal
import struct
import sys
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import orjson
from aiohttp import BodyPartReader, web

from gateway.demo.judge import question_in
from gateway.demo.payload import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    ApiError,
    Endpoint,
    Payload,
    headers_of,
    payload_for,
)
from gateway.demo.scenarios import MODEL, OTHERWISE, script_for
from gateway.demo.script import Script, ScriptError, turns
from gateway.demo.speech import MAX_TOP_LOGPROBS, Ask, Object

#: The model that is real: a transformer that reads orders; see `gateway.demo.orders`.
ORDERS = "orders"
MODELS = (MODEL, ORDERS, "demo-small", "no-logprobs-1", "gpt-4o-mini", "text-embedding-3-small")
MAX_BODY_BYTES = 256 * 2**20
MAX_CALLS = 200
MAX_COUNTERS = 10_000
WAIT_S = 10.0

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(slots=True)
class CallRecord:
    """A call as `GET /calls` tells it.

    `body_sha256` is of the whole body, for an upload to `/v1/files` of the file alone. `aborted`:
    the client went away before it had everything. `started` and `finished` are ISO 8601; `finished`
    is None while the call is under way.
    """

    method: str
    path: str
    query: str
    headers: dict[str, str]
    started: str
    body_sha256: str | None = None
    finished: str | None = None
    aborted: bool = False


class _Upstream:
    """The log of calls, and how often each script `id` was asked for. Both bounded."""

    def __init__(self) -> None:
        self.calls: deque[CallRecord] = deque(maxlen=MAX_CALLS)
        self.counters: OrderedDict[str, int] = OrderedDict()
        self.changed = asyncio.Condition()

    def application(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._logged])
        scripted = {
            "/v1/chat/completions": CHAT,
            "/v1/completions": COMPLETIONS,
            "/v1/responses": RESPONSES,
        }
        for path, endpoint in scripted.items():
            app.router.add_post(path, self._scripted(endpoint))
        app.router.add_get("/calls", self._get_calls)
        app.router.add_delete("/calls", self._forget_calls)
        app.router.add_get("/v1/chat/completions", _stored_completions)
        app.router.add_get("/v1/chat/completions/{id}", _stored(CHAT, "chatcmpl-"))
        app.router.add_get("/v1/responses/{id}", _stored(RESPONSES, "resp_"))
        app.router.add_get("/v1/models", _models)
        app.router.add_get("/v1/models/{id}", _model)
        app.router.add_post("/v1/embeddings", _embeddings)
        app.router.add_post("/v1/moderations", _moderations)
        app.router.add_post("/v1/files", _upload)
        app.router.add_get("/v1/files/{id}/content", _file_content)
        app.router.add_post("/v1/audio/speech", _speech)
        app.router.add_route("*", "/v1/{path:.*}", _echo)
        return app

    @web.middleware
    async def _logged(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if not request.path.startswith("/v1/"):
            return await handler(request)
        headers = {name.lower(): value for name, value in request.headers.items()}
        call = CallRecord(request.method, request.path, request.query_string, headers, _now())
        request["call"] = call
        self.calls.append(call)
        await self._notify()
        try:
            return await _send_whole(request, await handler(request))
        except ApiError as error:
            answer = web.Response(body=orjson.dumps({"error": error.error}), status=error.status)
            answer.headers.update(headers_of("application/json"))
            return await _send_whole(request, answer)
        except (asyncio.CancelledError, ConnectionError):
            call.aborted = True
            raise
        finally:
            call.finished = _now()
            await asyncio.shield(self._notify())

    async def _notify(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    async def _get_calls(self, request: web.Request) -> web.Response:
        """The calls so far; `?started=N` or `?finished=N` first waits for so many."""
        wanted = {name: int(request.query.get(name, "0")) for name in ("started", "finished")}

        def enough() -> bool:
            return all(sum(bool(getattr(c, k)) for c in self.calls) >= n for k, n in wanted.items())

        async with self.changed:
            try:
                async with asyncio.timeout(WAIT_S):
                    await self.changed.wait_for(enough)
            except TimeoutError:
                pass
        return _json({"calls": [asdict(call) for call in self.calls]})

    async def _forget_calls(self, _: web.Request) -> web.Response:
        self.calls.clear()
        return web.Response(status=204)

    def _scripted(self, endpoint: Endpoint) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            raw = await _body(request)
            body = _parsed(raw, endpoint.required)
            script = _written(body) if body.get("model") == ORDERS else self._script(body)
            if script.echo:
                script = script.model_copy(update={"text": _received(request, body)})
            await asyncio.sleep(script.delay_ms / 1000)
            if script.fault == "hang":
                await asyncio.Event().wait()
            return await _send(request, payload_for(endpoint, body, script), script)

        return handle

    def _script(self, body: Mapping[str, Any]) -> Script:
        try:
            question = question_in(body)
            script, later = (question.script, 0) if question else script_for(turns(body))
        except ScriptError as error:
            raise ApiError(400, str(error), param="demo") from error
        if script.id is not None:
            later = self.counters.get(script.id, 0)
            self.counters[script.id] = later + 1
            self.counters.move_to_end(script.id)
            if len(self.counters) > MAX_COUNTERS:
                self.counters.popitem(last=False)
        script = script.attempt(later)
        return question.answered(script) if question else script


@functools.cache
def _orders() -> Any:
    try:
        from gateway.demo.orders import Model  # noqa: PLC0415 - needs the extra `analysis`
    except ModuleNotFoundError as error:
        message = f"The model '{ORDERS}' needs {error.name}: install holdgate[analysis]."
        raise ApiError(503, message, param="model") from error
    return Model()


def _written(body: Mapping[str, Any]) -> Script:
    """What the model of orders writes to the newest message of a user."""
    said = [turn.text for turn in turns(body) if turn.speaker == "user"]
    wanted = body.get("top_logprobs", body.get("logprobs"))
    top = min(max(wanted, 0), MAX_TOP_LOGPROBS) if isinstance(wanted, int) else 0
    entries = [_entry(token) for token in _orders().answer(said[-1] if said else "", top)]
    return Script(logprobs=tuple(entries))


def _entry(token: Any) -> dict[str, Any]:
    def told(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "bytes": list(text.encode()), "logprob": round(logprob, 8)}

    tops = [told(*option) for option in token.top]
    return told(token.text, token.logprob) | {"top_logprobs": tops}


# ------------------------------------------------------------------------------------------ sending


async def _send(request: web.Request, payload: Payload, script: Script) -> web.StreamResponse:
    pause_s = script.token_delay_ms / 1000
    if script.fault == "slow_headers":
        return await _dribble(request, payload, pause_s or 0.05)
    response = web.StreamResponse(status=payload.status, headers=payload.headers)
    if script.fault == "close":
        return _hang_up(request, response)
    response.content_length = payload.length
    if payload.length is None:
        response.enable_chunked_encoding()
    await response.prepare(request)
    for number, piece in enumerate(payload.pieces):
        if pause_s and number:
            await asyncio.sleep(pause_s)
        await response.write(piece)
    if payload.cut:
        return _hang_up(request, response)
    await response.write_eof()
    return response


async def _dribble(request: web.Request, payload: Payload, pause_s: float) -> web.StreamResponse:
    """Write the header lines one at a time, then the body, bypassing the HTTP library."""
    head = [f"HTTP/1.1 {payload.status} Slow\r\n", "connection: close\r\n"]
    head += [f"{name}: {value}\r\n" for name, value in payload.headers.items()]
    for line in [*head, "\r\n"]:
        _transport(request).write(line.encode())
        await asyncio.sleep(pause_s)
    _transport(request).write(b"".join(payload.pieces))
    return _hang_up(request, web.StreamResponse())


def _hang_up(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Close the connection once what was written is sent; the library finds nobody to write to."""
    _transport(request).close()
    return response


def _transport(request: web.Request) -> asyncio.Transport:
    if not isinstance(request.transport, asyncio.Transport):
        raise ConnectionResetError("the client has gone")
    return request.transport


async def _send_whole(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Send what is not yet sent, so that a client that leaves meanwhile is noticed here."""
    if isinstance(response, web.Response):
        await response.prepare(request)
        await response.write_eof()
    return response


# ---------------------------------------------------------------------------------- other endpoints


def _now() -> str:
    return datetime.now(UTC).isoformat()


def _json(document: object) -> web.Response:
    return web.Response(body=orjson.dumps(document), headers=headers_of("application/json"))


async def _body(request: web.Request) -> bytes:
    raw = await request.read()
    request["call"].body_sha256 = hashlib.sha256(raw).hexdigest()
    return raw


def _parsed(raw: bytes, required: str) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        message = f"We could not parse the JSON body of your request: {error}."
        raise ApiError(400, message) from error
    if not isinstance(body, dict) or required not in body:
        raise ApiError(
            400,
            f"Missing required parameter: '{required}'.",
            param=required,
            code="missing_required_parameter",
        )
    return body


def _received(request: web.Request, body: Mapping[str, Any]) -> str:
    received = {
        "method": request.method,
        "path": request.path,
        "query": request.query_string,
        "headers": {name.lower(): value for name, value in request.headers.items()},
        "body": body,
    }
    return orjson.dumps(received).decode()


async def _stored_completions(_: web.Request) -> web.Response:
    data = [_canned(CHAT, f"demo{number}") for number in range(2)]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]}
    return _json({"object": "list", "data": data, **ends, "has_more": False})


def _stored(endpoint: Endpoint, prefix: str) -> Handler:
    async def handle(request: web.Request) -> web.StreamResponse:
        name = request.match_info["id"]
        if not name.startswith(prefix):
            raise ApiError(404, f"No such object: {name}", param="id", code="not_found")
        return _json(_canned(endpoint, name.removeprefix(prefix)))

    return handle


def _canned(endpoint: Endpoint, suffix: str) -> Object:
    return endpoint.body(Ask({"model": MODEL}, OTHERWISE, suffix, int(time.time())))


def _model_object(name: str) -> Object:
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "demo"}


async def _models(_: web.Request) -> web.Response:
    return _json({"object": "list", "data": [_model_object(name) for name in MODELS]})


async def _model(request: web.Request) -> web.Response:
    name = request.match_info["id"]
    if name not in MODELS:
        message = f"The model '{name}' does not exist or you do not have access to it."
        raise ApiError(404, message, param="model", code="model_not_found")
    return _json(_model_object(name))


async def _embeddings(request: web.Request) -> web.Response:
    body = _parsed(await _body(request), "input")
    inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
    size = body.get("dimensions") or 256
    data = []
    for number, text in enumerate(inputs):
        vector = _bag_of_words(str(text), size)
        packed = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
        value = packed if body.get("encoding_format") == "base64" else vector
        data.append({"object": "embedding", "index": number, "embedding": value})
    usage = {"prompt_tokens": len(inputs), "total_tokens": len(inputs)}
    return _json({"object": "list", "data": data, "model": body.get("model"), "usage": usage})


def _bag_of_words(text: str, size: int) -> list[float]:
    """The words of a text, each counted with a sign at a place that its hash says, at length 1: alike is what shares words.

    Nothing is learnt in it: it stands in for a model of embeddings as far as its form and its determinism go.
    """
    vector = [0.0] * size
    for word in re.findall(r"\w+", text.lower()):
        number = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        vector[(number >> 1) % size] += 1.0 if number & 1 else -1.0
    length = math.sqrt(sum(each * each for each in vector)) or 1.0
    return [each / length for each in vector]


_CATEGORIES = (
    *("harassment", "harassment/threatening", "hate", "hate/threatening", "illicit"),
    *("illicit/violent", "self-harm", "self-harm/intent", "self-harm/instructions", "sexual"),
    *("sexual/minors", "violence", "violence/graphic"),
)


async def _moderations(request: web.Request) -> web.Response:
    body = _parsed(await _body(request), "input")
    inputs = body["input"] if isinstance(body["input"], list) else [body["input"]]
    result = {
        "flagged": False,
        "categories": dict.fromkeys(_CATEGORIES, False),
        "category_scores": dict.fromkeys(_CATEGORIES, 0.0001),
        "category_applied_input_types": {name: ["text"] for name in _CATEGORIES},
    }
    results = [result for _ in inputs]
    return _json({"id": f"modr-{uuid.uuid4().hex}", "model": "demo-moderation", "results": results})


async def _upload(request: web.Request) -> web.Response:
    if not request.content_type.startswith("multipart/"):
        raise ApiError(400, "Send the file as multipart/form-data.", param="file")
    digest, size, filename, purpose = hashlib.sha256(), 0, None, "user_data"
    async for part in await request.multipart():
        if not isinstance(part, BodyPartReader):
            continue
        if part.name == "purpose":
            purpose = await part.text()
        elif part.name == "file":
            filename = part.filename
            while chunk := await part.read_chunk(65_536):
                digest.update(chunk)
                size += len(chunk)
    if filename is None:
        raise ApiError(400, "Missing required parameter: 'file'.", param="file")
    request["call"].body_sha256 = digest.hexdigest()
    about = {"filename": filename, "purpose": purpose, "bytes": size, "sha256": digest.hexdigest()}
    fixed = {"id": f"file-{uuid.uuid4().hex}", "object": "file", "status": "processed"}
    return _json(fixed | {"created_at": int(time.time())} | about)


async def _file_content(request: web.Request) -> web.StreamResponse:
    """As many bytes as the id says (`file-1048576`), each the low byte of its position, chunked."""
    size = request.match_info["id"].removeprefix("file-")
    if not size.isdecimal() or int(size) > MAX_BODY_BYTES:
        raise ApiError(404, f"No such File object: file-{size}", param="id")
    block = bytes(range(256)) * 256
    blocks = [block] * (int(size) // len(block)) + [block[: int(size) % len(block)]]
    headers = headers_of("application/octet-stream")
    return await _send(request, Payload(200, headers, [b for b in blocks if b]), OTHERWISE)


async def _speech(request: web.Request) -> web.StreamResponse:
    spoken = str(_parsed(await _body(request), "input")["input"]).encode()
    sound = b"ID3\x04\x00" + hashlib.shake_256(spoken).digest(4096)
    return await _send(request, Payload(200, headers_of("audio/mpeg"), [sound]), OTHERWISE)


async def _echo(request: web.Request) -> web.Response:
    digest, size = hashlib.sha256(), 0
    async for chunk in request.content.iter_any():
        digest.update(chunk)
        size += len(chunk)
    request["call"].body_sha256 = digest.hexdigest()
    about = {"object": "echo", "body_sha256": digest.hexdigest(), "body_bytes": size}
    seen = {"method": request.method, "path": request.path, "query": request.query_string}
    headers = {name.lower(): value for name, value in request.headers.items()}
    return _json(about | seen | {"headers": headers})


# ------------------------------------------------------------------------------------------ running


@asynccontextmanager
async def run_upstream(host: str = "127.0.0.1", port: int = 0) -> AsyncIterator[str]:
    """Serve until the block is left; gives the base URL without `/v1`. Port 0 takes a free one.

    Raises
    ------
    OSError
        If the address cannot be bound.
    """
    runner = web.AppRunner(
        _Upstream().application(),
        handler_cancellation=True,
        access_log=None,
        shutdown_timeout=0.2,
    )
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port)
        await site.start()
        bound = runner.addresses[0][1]
        yield f"http://{host}:{bound}"
    finally:
        await runner.cleanup()


def main(port: int = 9100, host: str = "127.0.0.1") -> None:
    """Serve until SIGINT or SIGTERM; prints `demo upstream ready on <url>` once it listens."""
    asyncio.run(_serve(host, port))


async def _serve(host: str, port: int) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with run_upstream(host, port) as url:
        sys.stdout.write(f"demo upstream ready on {url}\n")
        sys.stdout.flush()
        await stop.wait()
