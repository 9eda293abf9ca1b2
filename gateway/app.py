"""The composition root: settings in, a running application out."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import secrets
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import TypedDict

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from gateway import __version__, logs
from gateway.api import admin, decisions, review
from gateway.api.openai import OpenAIEdge
from gateway.asking import Asker
from gateway.audits import Audits
from gateway.auth import Authenticator
from gateway.bus import open_bus
from gateway.delivery import Delivery
from gateway.errors import GatewayError, InvalidRequest, NotFound, PayloadTooLarge
from gateway.interviews import Interviewer
from gateway.judging import Assessor
from gateway.jury import Jury
from gateway.live import LiveStreams
from gateway.monitors import Monitors
from gateway.pipeline import Pipeline
from gateway.policy_files import PolicyFiles
from gateway.ports import Bus, Clock
from gateway.recording import Recorder, new_id
from gateway.reviews import Reviews, WaitingRoom
from gateway.services import Services
from gateway.settings import Settings, load_settings
from gateway.spending import Prices, Spending
from gateway.store import open_store
from gateway.telemetry import Metrics
from gateway.upstream.routing import Router
from gateway.verdicts import Verdicts
from gateway.webhooks import Webhooks
from policies import PolicySet

#: How long work in the background rests after it broke.
_PAUSE_S = 1.0


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        """The time, aware UTC."""
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        """A count of seconds that never goes back."""
        return time.perf_counter()


class State(TypedDict):
    """What a request finds in its scope."""

    services: Services
    edge: OpenAIEdge


class Gateway:
    """The ASGI application: paths under /v1 go straight to the OpenAI edge, everything else to FastAPI."""

    def __init__(self, api: FastAPI) -> None:
        self._api = api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or the lifespan."""
        if scope["type"] == "http":
            if scope["path"].startswith("/v1/"):
                await scope["state"]["edge"](scope, receive, send)
                return
            receive = _bounded(receive, scope["state"]["services"].settings.limits.request_bytes)
        await self._api(scope, receive, send)


def _bounded(receive: Receive, limit_bytes: int) -> Receive:
    """The same request body, refused with 413 as soon as it is longer than the limit."""
    size_bytes = 0

    async def bounded() -> Message:
        nonlocal size_bytes
        message = await receive()
        size_bytes += len(message.get("body", b""))
        if size_bytes > limit_bytes:
            detail = f"The request body is longer than {limit_bytes} bytes (limits.request_bytes)."
            raise HTTPException(PayloadTooLarge.status, detail)
        return message

    return bounded


@contextlib.asynccontextmanager
async def running(settings: Settings, clock: Clock) -> AsyncIterator[Services]:
    """Every service, started; stopped in the opposite order when the context ends, with nothing lost."""
    metrics = Metrics()
    prices = Prices(settings.models)
    policies = PolicyFiles(settings.policies, settings.calibrators, prices)
    async with contextlib.AsyncExitStack() as stack:
        store = await open_store(settings.store.url)
        stack.push_async_callback(store.close)
        bus = await open_bus(settings.redis.url)
        stack.push_async_callback(bus.close)
        router = Router(settings)
        stack.push_async_callback(router.close)
        usd_per_minute = settings.review.usd_per_minute
        room = WaitingRoom(store, bus, clock, metrics, usd_per_minute=usd_per_minute)
        recorder = Recorder(store, bus, clock, metrics)
        spending = Spending(store, clock)
        await spending.refresh()
        stack.push_async_callback(spending.close)
        concurrency = settings.judges.concurrency
        interviewer = Interviewer(router, prices, clock, metrics, concurrency=concurrency)
        jury = _jury(settings, interviewer, bus, spending, clock, metrics)
        audits = Audits(store, secret=_audit_secret(settings))
        await audits.refresh()
        assessor = Assessor(policies, jury, audits, clock)
        response_bytes = settings.limits.response_bytes
        asker = Asker(router, clock, response_bytes=response_bytes)
        live = LiveStreams(assessor, recorder, clock, response_bytes=response_bytes)
        stack.push_async_callback(live.drain)
        hold = settings.hold
        webhooks = Webhooks(store, clock, metrics, settings)
        stack.push_async_callback(webhooks.close)
        services = Services(
            settings=settings,
            store=store,
            bus=bus,
            models=router,
            clock=clock,
            metrics=metrics,
            policies=policies,
            authenticator=Authenticator(
                store, required=_asks_for_keys(settings), monotonic_s=clock.monotonic_s
            ),
            interviewer=interviewer,
            pipeline=Pipeline(store, asker, assessor, recorder, live, clock),
            delivery=Delivery(
                store, room, keepalive_s=hold.keepalive_s, max_waiting=hold.max_waiting
            ),
            reviews=Reviews(store, bus, clock, room),
            room=room,
        )
        monitors = Monitors(store, policies, clock, metrics, new_id=new_id)
        stack.push_async_callback(monitors.close)
        _in_background(stack, policies.watch)
        for each in (room, spending, webhooks, audits, monitors):
            _in_background(stack, each.run)
        stack.callback(room.close)
        _on_stop_signal(room.close)
        _warn_of(policies.current)
        _tidy_memory()
        yield services


def _warn_of(policies: PolicySet) -> None:
    for problem in policies.warnings:
        logs.warning("policy_warning", problem=str(problem))


def _jury(
    settings: Settings,
    interviewer: Interviewer,
    bus: Bus,
    spending: Spending,
    clock: Clock,
    metrics: Metrics,
) -> Jury:
    given = settings.judges
    verdicts = Verdicts(bus, clock, limit_bytes=given.cache_bytes, keep_s=given.cache_s)
    return Jury(interviewer, verdicts, spending, clock, metrics, timeout_s=given.timeout_s)


def _in_background(stack: contextlib.AsyncExitStack, work: Callable[[], Awaitable[None]]) -> None:
    """Run something until the stack is left."""
    stack.push_async_callback(_stop, asyncio.create_task(kept_running(work)))


async def kept_running(work: Callable[[], Awaitable[None]], pause_s: float = _PAUSE_S) -> None:
    """Run something that does not end by itself; if it breaks, say so and run it again after a pause."""
    while True:
        try:
            await work()
        except Exception as error:  # noqa: BLE001 - whatever broke, it is said, and the work goes on
            logs.error(
                "background_work_broke", error, work=getattr(work, "__qualname__", repr(work))
            )
        await asyncio.sleep(pause_s)


def _tidy_memory() -> None:
    """Return what loading code took and no longer needs to the system (glibc; elsewhere nothing happens)."""
    # Long-lived objects are never garbage: keeping them out of the collector's way halves the CPU of large bodies.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _on_stop_signal(act: Callable[[], None]) -> None:
    """Act as soon as the process is told to stop, before the server waits for the requests in flight to finish."""
    if threading.current_thread() is not threading.main_thread():
        return
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        stop = signal.getsignal(number)

        def handle(number: int, frame: FrameType | None, stop: object = stop) -> None:
            loop.call_soon_threadsafe(act)
            if callable(stop):
                stop(number, frame)

        signal.signal(number, handle)


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _asks_for_keys(settings: Settings) -> bool | None:
    if settings.keys.required != "auto":
        return settings.keys.required == "yes"
    return None if settings.listen.host in ("127.0.0.1", "::1", "localhost") else True


def _audit_secret(settings: Settings) -> bytes:
    given = settings.secret(settings.audit_secret_env)
    if given is None:
        return secrets.token_bytes(32)
    return given.encode()


def create_app(settings: Settings, clock: Clock | None = None) -> Gateway:
    """The ASGI application; its services are made when it starts and closed when it stops."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[State]:
        async with running(settings, clock or SystemClock()) as services:
            yield {"services": services, "edge": OpenAIEdge(services)}

    api = FastAPI(
        title="Holdgate", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    for router in (review.router, decisions.router, admin.router):
        api.include_router(router)
    api.add_exception_handler(GatewayError, _gateway_error)
    api.add_exception_handler(RequestValidationError, _validation_error)
    api.add_exception_handler(HTTPException, _http_error)
    api.add_exception_handler(Exception, _unexpected)
    return Gateway(api)


def worker() -> Gateway:
    """The application of one worker process; the supervisor says in the environment where the settings are."""
    path = os.environ.get("HOLDGATE_CONFIG")
    settings = load_settings(Path(path) if path else None, os.environ)
    logs.configure(settings.log.level, settings.log.format)
    return create_app(settings)


def _error_response(error: GatewayError) -> Response:
    return Response(error.body(), error.status, error.headers, "application/json")


async def _gateway_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, GatewayError)
    return _error_response(error)


async def _validation_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = (f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors())
    return _error_response(InvalidRequest("; ".join(problems)))


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return _error_response(NotFound("There is nothing at this path."))
    if error.status_code == PayloadTooLarge.status:
        return _error_response(PayloadTooLarge(error.detail))
    answer = GatewayError(str(error.detail), code="http_error")
    answer.status = error.status_code
    return _error_response(answer)


async def _unexpected(_: Request, error: Exception) -> Response:
    logs.error("unexpected_error", error)
    return _error_response(GatewayError("Something went wrong in the gateway; its log says what."))
