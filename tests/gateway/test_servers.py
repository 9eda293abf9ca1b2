"""Servers as they are: framing, reuse of connections, pace, and servers that misbehave."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from gateway.errors import UpstreamError, UpstreamTimeout
from gateway.ports import UpstreamCall, UpstreamResponse
from gateway.settings import ModelEntry, Timeouts
from gateway.upstream.direct import DirectUpstream, open_session

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def a_server(
    talk: Talk,
    times: Timeouts | None = None,
    tls: ssl.SSLContext | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[DirectUpstream]:
    """Talk on every connection, and close it when all is said."""
    talks: list[asyncio.Future[None]] = []
    connections: list[asyncio.Task[None] | None] = []

    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(asyncio.current_task())
        talks.append(asyncio.ensure_future(talk(reader, writer)))
        await asyncio.wait(talks[-1:])
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()

    listening = await asyncio.start_server(closing, "127.0.0.1", 0, ssl=tls)
    port = listening.sockets[0].getsockname()[1]
    url = f"{'https' if tls else 'http'}://{host}:{port}"
    async with listening, open_session() as session:
        entry = ModelEntry(match="*", base_url=url, timeout_s=times or Timeouts(total=10))
        try:
            yield DirectUpstream(session, entry, None)
        finally:
            await session.close()
            for talking in talks:
                talking.cancel()
            await asyncio.gather(*talks, return_exceptions=True)
            await asyncio.gather(*filter(None, connections))


def saying(*answers: bytes) -> Talk:
    """One answer to each request, in turn, on every connection."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)

    return talk


async def ask(
    server: DirectUpstream,
    method: str = "GET",
    headers: Sequence[tuple[str, str]] = (),
    body: bytes | AsyncIterator[bytes] = b"",
) -> UpstreamResponse:
    return await server.send(UpstreamCall(method, "/", body=body, headers=headers))


async def whole(response: UpstreamResponse) -> bytes:
    return await response.read(10**9)


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (OK, 200, b"ok"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", 200, b"ok"),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2;a=b\r\nok\r\n0\r\nx: y\r\n\r\n",
            200,
            b"ok",
        ),
        (b"HTTP/1.1 200 OK\r\n\r\nuntil the end", 200, b"until the end"),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", 200, b"until the end"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\ncontent-length: 10\r\n\r\n", 304, b""),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, 200, b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + OK, 200, b"ok"),
    ],
)
async def test_response_ends_where_its_framing_says(
    answer: bytes, status: int, body: bytes
) -> None:
    async with a_server(saying(answer)) as server:
        response = await ask(server)
        assert (response.status, await whole(response)) == (status, body)
        assert "link" not in dict(response.headers)
        assert "x" not in dict(response.headers)


@pytest.mark.parametrize("cut", range(1, 60, 4))
async def test_response_may_come_in_any_pieces(cut: int) -> None:
    answer = (
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    )

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for piece in (answer[:cut], answer[cut:]):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)

    async with a_server(talk) as server:
        assert await whole(await ask(server)) == b"abcde"


@pytest.mark.parametrize(
    "answer",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"HTTP/2 200\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: a\x00b\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 30_000 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"a" * 100_000,
    ],
)
async def test_head_that_cannot_be_trusted_is_refused(answer: bytes) -> None:
    async with a_server(saying(answer)) as server:
        with pytest.raises(UpstreamError, match="not HTTP"):
            await ask(server)


async def test_trailers_without_end_are_not_kept() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ")
        while True:
            writer.write(b"a" * 10_000)
            await writer.drain()

    async with a_server(talk) as server:
        with pytest.raises(UpstreamError, match="not HTTP"):
            await whole(await ask(server))


async def test_head_response_has_no_body_whatever_its_headers_say() -> None:
    answer = b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n"
    async with a_server(saying(answer, answer)) as server:
        for _ in range(2):
            response = await ask(server, "HEAD")
            assert await whole(response) == b""
            assert dict(response.headers)["content-length"] == "1000"


class Counting:
    """A server that counts connections and requests; it talks on as it is told to."""

    def __init__(self, talk: Talk) -> None:
        self.connections = 0
        self._talk = talk

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        await self._talk(reader, writer)


async def test_connection_serves_one_request_after_another() -> None:
    talk = Counting(saying(*[OK] * 5))
    async with a_server(talk) as server:
        for _ in range(5):
            assert await whole(await ask(server, "POST", body=b"")) == b"ok"
    assert talk.connections == 1


async def test_requests_at_once_have_a_connection_each() -> None:
    talk = Counting(saying(OK))
    async with a_server(talk) as server:
        answers = await asyncio.gather(*(ask(server) for _ in range(5)))
        assert [await whole(each) for each in answers] == [b"ok"] * 5
    assert talk.connections == 5


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        OK + OK,
    ],
    ids=["close", "1.0", "second response"],
)
async def test_connection_is_not_used_again_after(answer: bytes) -> None:
    talk = Counting(saying(answer, b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong"))
    async with a_server(talk) as server:
        for _ in range(2):
            response = await ask(server)
            assert (response.status, await whole(response)) == (200, b"ok")
    assert talk.connections == 2


def closing_the_second() -> Talk:
    """A server that answers the first request of a connection, and closes it on the second."""

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(OK)
        await reader.readuntil(b"\r\n\r\n")

    return talk


async def test_request_that_may_be_repeated_is_sent_again_if_a_rested_connection_closes() -> None:
    async with a_server(closing_the_second()) as server:
        for _ in range(3):
            assert await whole(await ask(server, "GET")) == b"ok"


async def test_request_that_costs_money_is_sent_once_only() -> None:
    async with a_server(closing_the_second()) as server:
        assert await whole(await ask(server, "POST", body=b"{}")) == b"ok"
        with pytest.raises(UpstreamError, match="before it answered"):
            await ask(server, "POST", body=b"{}")


async def test_answer_to_an_upload_may_come_before_its_end() -> None:
    ended = asyncio.Event()

    async def upload() -> AsyncIterator[bytes]:
        try:
            yield b"begun"
            await asyncio.Event().wait()
        finally:
            ended.set()

    talk = Counting(saying(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 2\r\n\r\nno", OK))
    async with a_server(talk) as server:
        response = await ask(server, "POST", body=upload())
        assert (response.status, await whole(response)) == (413, b"no")
        await asyncio.wait_for(ended.wait(), 5)
        await ask(server)
    assert talk.connections == 2


async def test_server_that_does_not_read_slows_the_upload_down() -> None:
    sent_bytes = 0

    async def upload() -> AsyncIterator[bytes]:
        nonlocal sent_bytes
        while True:
            sent_bytes += 65_536
            yield bytes(65_536)

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await asyncio.Event().wait()

    async with a_server(talk, Timeouts(total=0.5)) as server:
        with pytest.raises(UpstreamTimeout):
            await ask(server, "POST", body=upload())
    assert 0 < sent_bytes < 50_000_000


async def test_reader_that_is_slow_slows_the_server_down() -> None:
    sent_bytes = 0

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent_bytes
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100000000\r\n\r\n")
        for _ in range(1000):
            writer.write(bytes(100_000))
            await writer.drain()
            sent_bytes += 100_000

    async with a_server(talk, Timeouts(read=0.3, total=30)) as server:
        response = await ask(server)
        await asyncio.sleep(0.7)  # longer than the server may be silent: it is not its turn
        assert sent_bytes < 50_000_000
        assert len(await whole(response)) == 100_000_000


async def test_server_that_cannot_be_reached_is_told_of_in_plain_words() -> None:
    listening = await asyncio.start_server(saying(OK), "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    listening.close()
    async with open_session() as session:
        server = DirectUpstream(
            session, ModelEntry(match="*", base_url=f"http://127.0.0.1:{port}"), None
        )
        with pytest.raises(UpstreamError, match=r"Could not connect to .*: Connection refused\.$"):
            await ask(server)


async def test_every_address_of_a_name_is_tried() -> None:
    async with a_server(saying(OK), host="localhost") as server:
        assert await whole(await ask(server)) == b"ok"


async def test_closing_ends_what_is_under_way() -> None:
    asked = asyncio.Event()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        asked.set()
        await reader.read()

    async with a_server(talk) as server:
        asking = asyncio.create_task(ask(server))
        await asked.wait()
        await server._session.close()
        with pytest.raises(UpstreamError):
            await asking


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for 127.0.0.1 that nobody has signed, with its key in the same file."""
    file = tmp_path / "certificate.pem"
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=127.0.0.1"]
    names = ["-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [*made, *names, "-keyout", file, "-out", tmp_path / "only.pem"],
        check=True,
        capture_output=True,
    )
    file.write_bytes(file.read_bytes() + (tmp_path / "only.pem").read_bytes())
    return file


def server_side(certificate: Path) -> ssl.SSLContext:
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate)
    return tls


async def test_server_without_a_trusted_certificate_is_told_nothing(certificate: Path) -> None:
    heard: list[bytes] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1000))

    async with a_server(talk, tls=server_side(certificate)) as server:
        with pytest.raises(UpstreamError, match="No trusted TLS connection"):
            await ask(server, headers=[("authorization", "Bearer secret")])
    assert b"".join(heard) == b""
