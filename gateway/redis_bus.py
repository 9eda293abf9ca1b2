"""Wake-ups between replicas by Redis pub/sub. Redis may come and go: only events are lost, and only meanwhile."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress

import msgspec
from redis.asyncio import Redis
from redis.asyncio.client import PubSub
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from tenacity import AsyncRetrying, retry_if_exception_type, wait_random_exponential

from gateway import logs
from gateway.local_bus import InProcessBus
from gateway.ports import Event

_CHANNEL = "holdgate:events"
_KEPT = "holdgate:kept:"

#: How long a publisher or an opening process waits for Redis.
_PATIENCE_S = 0.5

#: How long somebody who could do without waits for Redis.
_HASTE_S = 0.05

#: After this much silence Redis is asked whether it is there; after as much again it is taken for lost.
_SILENCE_S = 5.0

_LONGEST_PAUSE_S = 5.0

_LOST = (RedisError, OSError, TimeoutError)


class _Message(msgspec.Struct, array_like=True, forbid_unknown_fields=True):
    origin: str
    kind: str
    id: str


class RedisBus(InProcessBus):
    """Calls the subscribers of this process at once, and those of other replicas while Redis is there.

    Each time the connection is made, subscribers get `Event("bus.reconnected", "")`: events may have been missed, so
    whoever waits for something should look at the store.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._origin = secrets.token_hex(8)
        self._redis = Redis.from_url(
            url,
            socket_timeout=_PATIENCE_S,
            socket_connect_timeout=_PATIENCE_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._subscribed = asyncio.Event()
        self._listening: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Begin to listen; returns once Redis answers, or soon anyway."""
        self._listening = asyncio.create_task(self._listen())
        with suppress(TimeoutError):
            await asyncio.wait_for(self._subscribed.wait(), 2 * _PATIENCE_S)

    async def publish(self, event: Event) -> None:
        """Call the subscribers here, and tell Redis if it is there; takes half a second at most."""
        self._deliver(event)
        if not self._subscribed.is_set():
            return
        message = msgspec.json.encode(_Message(self._origin, event.kind, event.id))
        try:
            async with asyncio.timeout(_PATIENCE_S):
                await self._redis.publish(_CHANNEL, message)
        except _LOST as error:
            logs.warning("bus.event_not_sent", kind=event.kind, id=event.id, error=str(error))

    async def recall(self, key: str) -> bytes | None:
        """What a replica kept under that key, if Redis is there and says it within 50 ms."""
        if not self._subscribed.is_set():
            return None
        try:
            async with asyncio.timeout(_HASTE_S):
                found = await self._redis.get(_KEPT + key)
                return found if isinstance(found, bytes) else None
        except _LOST as error:
            logs.warning("bus.not_recalled", error=str(error))
            return None

    async def keep(self, key: str, value: bytes, for_s: float) -> None:
        """Have every replica recall this for so many seconds, if Redis is there and takes it within 50 ms."""
        if not self._subscribed.is_set():
            return
        try:
            async with asyncio.timeout(_HASTE_S):
                await self._redis.set(_KEPT + key, value, px=max(1, round(1000 * for_s)))
        except _LOST as error:
            logs.warning("bus.not_kept", error=str(error))

    async def close(self) -> None:
        """Stop listening and let go of connections."""
        await super().close()
        if self._listening is not None:
            self._listening.cancel()
            with suppress(asyncio.CancelledError):
                await self._listening
        await self._redis.aclose()

    async def _listen(self) -> None:
        while True:
            async with self._redis.pubsub() as pubsub:
                try:
                    await self._subscribe(pubsub)
                    await self._receive(pubsub)
                except _LOST as error:
                    logs.warning("bus.lost", error=str(error))
                finally:
                    self._subscribed.clear()

    async def _subscribe(self, pubsub: PubSub) -> None:
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(_LOST),
            wait=wait_random_exponential(multiplier=0.1, max=_LONGEST_PAUSE_S),
        )
        await retrying(pubsub.subscribe, _CHANNEL)
        self._subscribed.set()
        self._deliver(Event("bus.reconnected", ""))

    async def _receive(self, pubsub: PubSub) -> None:
        asked = False
        while True:
            message = await pubsub.get_message(timeout=_SILENCE_S)
            if message is not None:
                asked = False
                if message["type"] == "message":
                    self._take(message["data"])
            elif asked:
                raise TimeoutError(f"no answer for {_SILENCE_S:g} s")
            else:
                asked = True
                await pubsub.ping()

    def _take(self, data: bytes) -> None:
        try:
            message = msgspec.json.decode(data, type=_Message)
        except msgspec.MsgspecError:
            logs.warning("bus.message_not_understood", bytes=len(data))
            return
        if message.origin != self._origin:
            self._deliver(Event(message.kind, message.id))
