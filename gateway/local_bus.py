"""Wake-ups within one process."""

from __future__ import annotations

from collections.abc import Callable

from gateway import logs
from gateway.ports import Event


class InProcessBus:
    """Calls the subscribers of this process."""

    def __init__(self) -> None:
        self._handlers: dict[object, Callable[[Event], None]] = {}

    async def publish(self, event: Event) -> None:
        """Call every subscriber before this returns."""
        self._deliver(event)

    def subscribe(self, handler: Callable[[Event], None]) -> Callable[[], None]:
        """Call `handler` for every event from now on; returns the way to stop it."""
        key = object()
        self._handlers[key] = handler

        def unsubscribe() -> None:
            self._handlers.pop(key, None)

        return unsubscribe

    async def recall(self, key: str) -> bytes | None:
        """None: there is no other replica that could have kept anything."""

    async def keep(self, key: str, value: bytes, for_s: float) -> None:
        """Do nothing: whoever asks within this process keeps it there."""

    async def close(self) -> None:
        """Forget every subscriber."""
        self._handlers.clear()

    def _deliver(self, event: Event) -> None:
        for handler in tuple(self._handlers.values()):
            try:
                handler(event)
            except Exception as error:  # noqa: BLE001 - one subscriber's fault must not keep the event from the others
                logs.error("bus.handler_failed", error, kind=event.kind, id=event.id)
