"""A load generator: keep-alive connections, closed loop or at a fixed rate; latencies from the time a request was due."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from statistics import quantiles
from urllib.parse import urlsplit

import uvloop

from benchmarks import answers


@dataclass
class Tally:
    """What one run saw; times in milliseconds."""

    latencies_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    events: int = 0
    failed: int = 0

    def summary(self, took_s: float) -> dict[str, float]:
        """The figures of the run."""
        done = len(self.latencies_ms)
        found: dict[str, float] = {"requests": done, "failed": self.failed, "per_s": done / took_s}
        for name, values in (("latency", self.latencies_ms), ("first", self.first_ms)):
            if len(values) > 1:
                cuts = quantiles(values, n=100, method="inclusive")
                found |= {f"{name}_p50_ms": cuts[49], f"{name}_p99_ms": cuts[98]}
        found["events_per_s"] = self.events / took_s
        return found


class Connection:
    """One keep-alive connection that sends the same request again and again."""

    def __init__(self, url: str, body: bytes) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
        self._request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection(
            self._host, self._port, limit=1 << 22
        )

    async def ask(self, tally: Tally, due_s: float) -> None:
        """Send the request, read the response to its end, and note what was seen."""
        self._writer.write(self._request)
        head = (await self._reader.readuntil(b"\r\n\r\n")).lower()
        first_s = None
        if b"content-length: " in head:
            await self._reader.readexactly(
                int(head.split(b"content-length: ")[1].split(b"\r\n")[0])
            )
        else:
            while size := int(await self._reader.readline(), 16):
                data = await self._reader.readexactly(size + 2)
                first_s = first_s or time.perf_counter()
                tally.events += data.count(b"\n\n")
            await self._reader.readline()
        now_s = time.perf_counter()
        if not head.startswith(b"http/1.1 200"):
            tally.failed += 1
            return
        tally.latencies_ms.append(1000 * (now_s - due_s))
        if first_s is not None:
            tally.first_ms.append(1000 * (first_s - due_s))


async def run(
    url: str, body: bytes, *, connections: int, seconds: float, rate: float | None
) -> dict[str, float]:
    """Load `url` for a while and say what was seen; `rate` requests per second in all, or as fast as answers come."""
    tally = Tally()
    pool = [Connection(url, body) for _ in range(connections)]
    await asyncio.gather(*(connection.open() for connection in pool))
    began_s = time.perf_counter()

    async def closed(connection: Connection) -> None:
        while (now_s := time.perf_counter()) - began_s < seconds:
            await connection.ask(tally, now_s)

    async def paced(connection: Connection, number: int) -> None:
        interval_s = connections / (rate or 1)
        due_s = began_s + number * interval_s / connections
        while due_s - began_s < seconds:
            await asyncio.sleep(max(due_s - time.perf_counter(), 0))
            await connection.ask(tally, due_s)
            due_s += interval_s

    work = [paced(c, n) if rate else closed(c) for n, c in enumerate(pool)]
    await asyncio.gather(*work)
    took_s = time.perf_counter() - began_s
    with contextlib.suppress(OSError):
        for connection in pool:
            connection._writer.close()
    return tally.summary(took_s)


def main() -> None:
    """Run one scenario given as JSON on standard input; print the figures as JSON."""
    wanted = json.load(sys.stdin)
    body = answers.request(
        wanted["model"], stream=wanted["stream"], with_logprobs=wanted["logprobs"]
    )
    work = run(
        wanted["url"],
        body,
        connections=wanted["connections"],
        seconds=wanted["seconds"],
        rate=wanted.get("rate"),
    )
    print(json.dumps(uvloop.run(work)))


if __name__ == "__main__":
    main()
