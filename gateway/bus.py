"""Opening a bus: `gateway.local_bus` within one process, `gateway.redis_bus` between replicas."""

from __future__ import annotations

from gateway.local_bus import InProcessBus
from gateway.ports import Bus


async def open_bus(url: str | None) -> Bus:
    """The bus at a Redis URL, or one within this process if there is none.

    Redis need not be there: the bus then works within this process until Redis is.
    """
    if url is None:
        return InProcessBus()
    # 20 MB and 0.3 s that a process on its own never needs.
    from gateway.redis_bus import RedisBus  # noqa: PLC0415

    bus = RedisBus(url)
    await bus.open()
    return bus
