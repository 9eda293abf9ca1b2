"""Speaking to a server of the OpenAI dialect: bytes and headers as they came, errors made ours."""

from __future__ import annotations

import asyncio
import gzip
import inspect
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import aiohttp
import pytest
import zstandard
from aiohttp import client_exceptions, web
from aiohttp.client_reqrep import ConnectionKey

from gateway.errors import InvalidRequest, UpstreamError, UpstreamTimeout
from gateway.ports import UpstreamCall
from gateway.settings import ModelEntry, Timeouts
from gateway.upstream.direct import DirectUpstream, _explained, open_session
from tests.gateway.loopback import Handler, serving

BODY = b'{ "model":"m",  "n": 1.0e0 , "unknown":[1,2] }'


@asynccontextmanager
async def upstream_of(
    handler: Handler, *, api_key: str | None = None, timeout_s: Timeouts | None = None
) -> AsyncIterator[DirectUpstream]:
    async with serving(handler) as url, open_session() as session:
        entry = ModelEntry(match="*", base_url=url, timeout_s=timeout_s or Timeouts())
        yield DirectUpstream(session, entry, api_key)


@asynccontextmanager
async def raw_server(
    talk: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[DirectUpstream]:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await talk(reader, writer)
        writer.close()

    server = await asyncio.start_server(closing, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    async with server, open_session() as session:
        entry = ModelEntry(match="*", base_url=f"http://{host}:{port}/v1")
        yield DirectUpstream(session, entry, None)


class Recorder:
    """A provider that keeps what it was sent and answers with what it was given."""

    def __init__(self, **response: object) -> None:
        self.response = response
        self.request: web.Request
        self.body = b""

    async def __call__(self, request: web.Request) -> web.Response:
        self.request = request
        self.body = await request.read()
        return web.Response(**self.response)  # type: ignore[arg-type]

    def sent(self, name: str) -> list[str]:
        return self.request.headers.getall(name, [])


def post(**fields: object) -> UpstreamCall:
    call = {"method": "POST", "path": "/chat/completions", "body": BODY, "model": "m"}
    return UpstreamCall(**(call | fields))  # type: ignore[arg-type]


async def test_bytes_pass_untouched_both_ways() -> None:
    provider = Recorder(body=b'{"z":1,  "a":2}', status=201)
    async with upstream_of(provider) as upstream, await upstream.send(post()) as response:
        assert response.status == 201
        assert await response.read(1000) == b'{"z":1,  "a":2}'
    assert provider.body == BODY
    assert provider.request.path == "/v1/chat/completions"
    assert provider.sent("content-length") == [str(len(BODY))]


async def test_path_and_query_pass_as_they_were_written() -> None:
    provider = Recorder()
    call = post(method="GET", path="/files/a%2Fb%20c", query="after=%2B&x=a+b&y=%C3%A9", body=b"")
    async with upstream_of(provider) as upstream:
        await (await upstream.send(call)).read(10)
    assert provider.request.raw_path == "/v1/files/a%2Fb%20c?after=%2B&x=a+b&y=%C3%A9"


@pytest.mark.parametrize(
    ("path", "query"),
    [
        ("/../admin", ""),
        ("/files/%2e%2E/admin", ""),
        ("/files/..%5cadmin", ""),
        ("files", ""),
        ("/a?b", ""),
        ("/a#b", ""),
        ("/a\r\nx-evil: 1", ""),
        ("/é", ""),
        ("/a", "b#c"),
        ("/a", "b c"),
    ],
)
async def test_path_that_would_leave_the_base_url_is_refused(path: str, query: str) -> None:
    async with upstream_of(Recorder()) as upstream:
        with pytest.raises(InvalidRequest) as caught:
            await upstream.send(post(path=path, query=query))
    assert caught.value.code == "invalid_path"


async def test_headers_for_this_hop_and_our_own_do_not_go_upstream() -> None:
    kept = [
        ("X-Custom", "1"),
        ("x-custom", "2"),
        ("OpenAI-Organization", "org"),
        ("User-Agent", "sdk"),
    ]
    dropped = [
        ("Connection", "keep-alive, X-Named"),
        ("X-Named", "for the next hop only"),
        ("Keep-Alive", "timeout=5"),
        ("TE", "trailers"),
        ("Proxy-Authorization", "Basic abc"),
        ("Expect", "100-continue"),
        ("Prefer", "wait=5"),
        ("X-Holdgate-Task", "refund"),
        ("Cookie", "session=secret"),
    ]
    provider = Recorder()
    async with upstream_of(provider) as upstream:
        headers = [*kept, *dropped, ("Host", "gateway.example"), ("Content-Length", "9999")]
        await (await upstream.send(post(headers=headers))).read(10)
    assert provider.sent("x-custom") == ["1", "2"]
    assert provider.sent("openai-organization") == ["org"]
    assert provider.sent("user-agent") == ["sdk"]
    names = [name for name, _ in dropped if name != "Connection"]
    assert [name for name in names if provider.sent(name)] == []
    assert provider.sent("host") == [provider.request.host]
    assert "gateway.example" not in provider.request.host
    assert provider.sent("content-length") == [str(len(BODY))]


async def test_nothing_is_added_to_the_headers() -> None:
    provider = Recorder()
    async with upstream_of(provider) as upstream:
        await (await upstream.send(post(method="GET", body=b""))).read(10)
    assert set(provider.request.headers) == {"Host"}


@pytest.mark.parametrize("method", ["GET", "HEAD", "DELETE"])
async def test_call_without_a_body_gets_no_content_type(method: str) -> None:
    provider = Recorder()
    async with upstream_of(provider) as upstream:
        await (await upstream.send(post(method=method, body=b""))).read(10)
    assert provider.sent("content-type") == []
    assert provider.body == b""


async def test_key_of_the_entry_replaces_the_clients() -> None:
    provider = Recorder()
    async with upstream_of(provider, api_key="sk-ours") as upstream:
        call = post(headers=[("authorization", "Bearer theirs")])
        await (await upstream.send(call)).read(10)
    assert provider.sent("authorization") == ["Bearer sk-ours"]


async def test_key_of_the_client_is_forwarded_if_the_entry_has_none() -> None:
    provider = Recorder()
    async with upstream_of(provider) as upstream:
        call = post(headers=[("authorization", "Bearer theirs")])
        await (await upstream.send(call)).read(10)
    assert provider.sent("authorization") == ["Bearer theirs"]


async def test_header_outside_ascii_arrives_with_its_own_bytes() -> None:
    provider = Recorder()
    as_our_server_reads_it = "José".encode().decode("latin-1")
    async with upstream_of(provider) as upstream:
        await (await upstream.send(post(headers=[("x-name", as_our_server_reads_it)]))).read(10)
    assert (b"x-name", "José".encode()) in provider.request.raw_headers


async def test_response_headers_keep_order_and_duplicates_and_are_in_lower_case() -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(BODY)
        writer.write(
            b"HTTP/1.1 429 Slow\r\nX-B: 1\r\nretry-after-MS: 20\r\nx-a: 2\r\nX-B: 3\r\n"
            b"Connection: close, x-hop\r\nX-Hop: 1\r\nX-Holdgate-Action: return\r\n"
            b'Alt-Svc: h3=":443"\r\nX-Name: Jos\xc3\xa9\r\nContent-Length: 2\r\n\r\n{}'
        )

    async with raw_server(talk) as upstream, await upstream.send(post()) as response:
        assert response.status == 429
        assert response.headers == [
            ("x-b", "1"),
            ("retry-after-ms", "20"),
            ("x-a", "2"),
            ("x-b", "3"),
            ("x-name", b"Jos\xc3\xa9".decode("latin-1")),
            ("content-length", "2"),
        ]
        assert response.header("retry-after-ms") == "20"
        assert response.header("absent") is None


async def test_cookies_are_relayed_and_never_kept() -> None:
    provider = Recorder(headers={"set-cookie": "a=1; Path=/"})
    async with upstream_of(provider) as upstream:
        async with await upstream.send(post()) as response:
            assert response.header("set-cookie") == "a=1; Path=/"
        await (await upstream.send(post())).read(10)
    assert provider.sent("cookie") == []


async def test_redirect_is_relayed_and_not_followed() -> None:
    provider = Recorder(status=307, headers={"location": "http://127.0.0.1:1/elsewhere"})
    async with upstream_of(provider) as upstream, await upstream.send(post()) as response:
        assert response.status == 307
        assert response.header("location") == "http://127.0.0.1:1/elsewhere"


async def test_compressed_body_passes_untouched() -> None:
    packed = gzip.compress(b"hello")
    provider = Recorder(body=packed, headers={"content-encoding": "gzip"})
    async with upstream_of(provider) as upstream:
        call = post(headers=[("accept-encoding", "gzip, br")])
        async with await upstream.send(call) as response:
            assert response.header("content-encoding") == "gzip"
            assert await response.read(1000) == packed
    assert provider.sent("accept-encoding") == ["gzip, br"]


def raw_deflate(data: bytes) -> bytes:
    packing = zlib.compressobj(wbits=-15)
    return packing.compress(data) + packing.flush()


PACKED: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip of two members": ("GZIP", lambda d: gzip.compress(d[:2]) + gzip.compress(d[2:])),
    "deflate": ("deflate", zlib.compress),
    "deflate without header": ("deflate", raw_deflate),
    "zstd": ("zstd", zstandard.compress),
}


@pytest.mark.parametrize("name", PACKED)
async def test_readable_body_is_asked_for_plain_and_unpacked_if_it_is_not(name: str) -> None:
    encoding, pack = PACKED[name]
    provider = Recorder(body=pack(b"hello"), headers={"content-encoding": encoding})
    async with upstream_of(provider) as upstream:
        call = post(headers=[("accept-encoding", "gzip, br")], readable=True)
        async with await upstream.send(call) as response:
            assert response.header("content-encoding") is None
            assert response.header("content-length") is None
            assert await response.read(1000) == b"hello"
    assert provider.sent("accept-encoding") == ["identity"]


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", b"not packed at all"),
        ("deflate", b"not packed at all"),
        ("br", b"not packed at all"),
        ("zstd", b"not packed at all"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"hello", mtime=0), mtime=0)),
        ("gzip", gzip.compress(b"hello", mtime=0)[:-4]),
        ("deflate", zlib.compress(b"hello")[:-4]),
        ("zstd", zstandard.compress(b"hello")[:-4]),
    ],
)
async def test_readable_body_that_cannot_be_unpacked_is_an_upstream_error(
    encoding: str, body: bytes
) -> None:
    provider = Recorder(body=body, headers={"content-encoding": encoding})
    async with upstream_of(provider) as upstream:
        with pytest.raises(UpstreamError, match="asked not to pack it"):
            await (await upstream.send(post(readable=True))).read(1000)


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd"])
async def test_limit_holds_for_the_unpacked_size(name: str) -> None:
    encoding, pack = PACKED[name]
    bomb = pack(bytes(50_000_000))
    provider = Recorder(body=bomb, headers={"content-encoding": encoding})
    async with (
        upstream_of(provider) as upstream,
        await upstream.send(post(readable=True)) as response,
    ):
        with pytest.raises(UpstreamError) as caught:
            await response.read(len(bomb) + 1)
    assert caught.value.code == "upstream_response_too_large"


@pytest.mark.parametrize("name", ["gzip", "deflate", "zstd"])
async def test_packed_body_is_unpacked_in_pieces_of_bounded_size(name: str) -> None:
    encoding, pack = PACKED[name]
    provider = Recorder(body=pack(bytes(50_000_000)), headers={"content-encoding": encoding})
    async with upstream_of(provider) as upstream:
        pieces = [len(p) async for p in (await upstream.send(post(readable=True))).iter_chunks()]
    assert sum(pieces) == 50_000_000
    assert max(pieces) <= 4_000_000


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 6_000_000])
async def test_large_body_arrives_whole(size: int) -> None:
    provider = Recorder()
    body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    async with upstream_of(provider) as upstream:
        await (await upstream.send(post(body=body))).read(10)
    assert provider.body == body
    assert provider.sent("content-length") == [str(size)]


@pytest.mark.parametrize("headers", [[], [("Content-Length", "6")]], ids=["chunked", "sized"])
async def test_streamed_upload_arrives_whole(headers: list[tuple[str, str]]) -> None:
    async def upload() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b"def"

    provider = Recorder()
    async with upstream_of(provider) as upstream:
        await (await upstream.send(post(body=upload(), headers=headers))).read(10)
    assert provider.body == b"abcdef"
    assert provider.sent("content-length") == [value for _, value in headers]


async def test_upload_that_breaks_off_is_an_upstream_error() -> None:
    async def upload() -> AsyncIterator[bytes]:
        yield b"abc"
        raise ConnectionResetError("the client went away")

    async with upstream_of(Recorder()) as upstream:
        with pytest.raises(UpstreamError):
            await upstream.send(post(body=upload()))


async def test_chunks_arrive_as_they_are_sent() -> None:
    go_on = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await go_on.wait()
        await response.write(b"data: 2\n\n")
        return response

    async with upstream_of(handler) as upstream, await upstream.send(post()) as response:
        chunks = response.iter_chunks()
        assert await anext(chunks) == b"data: 1\n\n"
        go_on.set()
        assert [chunk async for chunk in chunks] == [b"data: 2\n\n"]


async def test_connection_is_used_again_once_the_body_is_read() -> None:
    peers = []

    async def handler(request: web.Request) -> web.Response:
        peers.append(request.transport.get_extra_info("peername"))  # type: ignore[union-attr]
        return web.Response(body=b"ok")

    async with upstream_of(handler) as upstream:
        for _ in range(3):
            await (await upstream.send(post())).read(10)
    assert len(set(peers)) == 1


async def hanging(ended: asyncio.Event, asked: asyncio.Event, request: web.Request) -> web.Response:
    asked.set()
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()
    raise AssertionError("unreachable")


async def test_cancelling_the_caller_stops_the_provider_before_it_answers() -> None:
    asked, ended = asyncio.Event(), asyncio.Event()
    async with upstream_of(lambda request: hanging(ended, asked, request)) as upstream:
        task = asyncio.create_task(upstream.send(post()))
        await asked.wait()
        task.cancel()
        await asyncio.wait_for(ended.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("way", ["read", "iterate", "context"])
async def test_cancelling_the_caller_stops_the_provider_in_mid_stream(way: str) -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return response

    async def consume(upstream: DirectUpstream) -> None:
        response = await upstream.send(post())
        begun.set()
        match way:
            case "read":
                await response.read(1000)
            case "iterate":
                async for _ in response.iter_chunks():
                    pass
            case _:
                async with response:
                    await asyncio.Event().wait()

    async with upstream_of(handler) as upstream:
        task = asyncio.create_task(consume(upstream))
        await begun.wait()
        task.cancel()
        await asyncio.wait_for(ended.wait(), 5)
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_body_over_the_limit_is_refused_and_the_provider_stopped() -> None:
    ended = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(bytes(100_000))
        finally:
            ended.set()

    async with upstream_of(handler) as upstream, await upstream.send(post()) as response:
        with pytest.raises(UpstreamError, match="500000 bytes"):
            await response.read(500_000)
        await asyncio.wait_for(ended.wait(), 5)


async def test_provider_that_does_not_listen_is_unreachable() -> None:
    async with serving(Recorder()) as url:
        pass
    async with open_session() as session:
        upstream = DirectUpstream(session, ModelEntry(match="*", base_url=url), "sk-secret")
        with pytest.raises(
            UpstreamError, match=r"Could not connect to http://127\.0\.0\.1"
        ) as caught:
            await upstream.send(post())
    assert (caught.value.status, caught.value.code) == (502, "upstream_error")
    assert not isinstance(caught.value, UpstreamTimeout)


async def test_provider_that_does_not_answer_in_time_is_a_timeout() -> None:
    asked, ended = asyncio.Event(), asyncio.Event()
    async with upstream_of(
        lambda r: hanging(ended, asked, r), timeout_s=Timeouts(read=0.05)
    ) as upstream:
        with pytest.raises(UpstreamTimeout) as caught:
            await upstream.send(post())
        await asyncio.wait_for(ended.wait(), 5)
    assert caught.value.status == 504


@pytest.mark.parametrize("timeout_s", [Timeouts(read=0.2), Timeouts(total=0.2)], ids=str)
async def test_provider_that_falls_silent_in_mid_stream_is_a_timeout(timeout_s: Timeouts) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        await asyncio.Event().wait()
        return response

    async with upstream_of(handler, timeout_s=timeout_s) as upstream:
        response = await upstream.send(post())
        with pytest.raises(UpstreamTimeout):
            await response.read(1000)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "closed the connection"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "not HTTP"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", "broke off"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "broke off|not HTTP"),
    ],
    ids=["nothing", "another protocol", "too short", "bad chunk"],
)
async def test_answer_that_is_not_http_is_an_upstream_error(answer: bytes, message: str) -> None:
    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(BODY)
        writer.write(answer)

    async with raw_server(talk) as upstream:
        with pytest.raises(UpstreamError, match=message):
            await (await upstream.send(post())).read(1000)


def every_client_error() -> list[aiohttp.ClientError]:
    secret = "https://key-in-url@host/path?secret=1"
    key = ConnectionKey("host", 443, True, True, None, None, None)
    info = aiohttp.RequestInfo(secret, "POST", {"Authorization": "secret"}, secret)  # type: ignore[arg-type]
    fatal = OSError(111, "Connection refused")
    made: list[aiohttp.ClientError] = []
    for kind in vars(client_exceptions).values():
        if not (inspect.isclass(kind) and issubclass(kind, aiohttp.ClientError)):
            continue
        if issubclass(kind, aiohttp.ClientConnectorCertificateError):
            made.append(kind(key, ssl.CertificateError("secret")))
        elif issubclass(kind, client_exceptions.UnixClientConnectorError):
            made.append(kind("/run/secret", key, fatal))
        elif issubclass(kind, aiohttp.ClientConnectorError):
            made.append(kind(key, fatal))
        elif issubclass(kind, aiohttp.ClientResponseError):
            made.append(kind(info, (), message="secret"))
        elif issubclass(kind, aiohttp.ServerFingerprintMismatch):
            made.append(kind(b"secret", b"x", "host", 443))
        elif issubclass(kind, aiohttp.InvalidURL):
            made.append(kind(secret, "secret"))
        else:
            made.append(kind("secret"))
    return made


def test_there_are_many_kinds_of_client_errors() -> None:
    assert len(every_client_error()) > 20


@pytest.mark.parametrize("error", every_client_error(), ids=lambda error: type(error).__name__)
def test_every_client_error_becomes_ours_and_tells_no_secret(error: aiohttp.ClientError) -> None:
    ours = _explained(error, "https://api.example")
    assert "https://api.example" in ours.message
    assert "secret" not in ours.message
    late = type(error) in (aiohttp.ServerTimeoutError, aiohttp.SocketTimeoutError)
    assert isinstance(ours, UpstreamTimeout) == late
