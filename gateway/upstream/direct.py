"""Providers of the OpenAI dialect: original bytes there and back over one pool of connections."""

from __future__ import annotations

import io
import os
import re
import ssl
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import lru_cache
from urllib.parse import unquote

import aiohttp
import zstandard
from yarl import URL

from gateway.errors import InvalidRequest, UpstreamError, UpstreamTimeout
from gateway.ports import UpstreamCall, UpstreamResponse
from gateway.settings import ModelEntry

OPENAI_URL = "https://api.openai.com/v1"

_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
#: With these a server may take a GET for a POST, and so for a call that would have to be checked.
_OVERRIDES = {"x-http-method-override", "x-http-method", "x-method-override"}
_NOT_SENT: frozenset[str] = _HOP_BY_HOP | _OVERRIDES | {"host", "expect", "prefer", "cookie"}
_NOT_RELAYED = _HOP_BY_HOP | {"alt-svc"}
_PATH = re.compile(r"/[^?#\x00-\x20\x7f-\U0010ffff]*")
_QUERY = re.compile(r"[^#\x00-\x20\x7f-\U0010ffff]*")

#: A longer body is written piece by piece.
_LARGE_BODY_BYTES = 2**20
#: So much of a packed body is unpacked at a time, and so much of a zstd frame is: four bytes of it may stand for 128 KiB.
_PIECE_BYTES = 2**18
_ZSTD_BYTES = 64
_ZSTD_WINDOW_BYTES = 2**23  # what every decoder should accept (RFC 8878, section 3.1.1.1.2)


def open_session() -> aiohttp.ClientSession:
    """Open a pool of connections that adds nothing to a message: no cookies, no headers of its own.

    Must be called on the event loop that will use it.
    """
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("accept", "accept-encoding", "content-type", "user-agent"),
        auto_decompress=False,
        read_bufsize=2**18,
    )


class DirectUpstream:
    """A server of the OpenAI dialect, as a model entry describes it."""

    def __init__(
        self, session: aiohttp.ClientSession, entry: ModelEntry, api_key: str | None
    ) -> None:
        self._session = session
        self._base = entry.base_url or OPENAI_URL
        self._origin = str(URL(self._base).origin())
        self._authorization = f"Bearer {api_key}" if api_key else None
        self._dropped = _NOT_SENT | {"authorization"} if api_key else _NOT_SENT
        times = entry.timeout_s
        self._timeout = aiohttp.ClientTimeout(
            total=times.total, connect=times.connect, sock_read=times.read
        )

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        """See `gateway.ports.Upstream`. A key of the entry replaces the client's `Authorization`.

        Raises `InvalidRequest` if the path would leave the base URL.
        """
        url = _url(self._base, call.path, call.query)
        try:
            response = await self._session.request(
                call.method,
                url,
                headers=self._headers(call),
                data=_payload(call.body),
                timeout=self._timeout,
                allow_redirects=False,
            )
        except (aiohttp.ClientError, OSError) as error:
            raise _explained(error, self._origin) from error
        body: AsyncIterator[bytes] = _Body(response.content, self._origin)
        dropped = _NOT_RELAYED
        encoding = response.headers.get("content-encoding", "") if call.readable else ""
        if encoding:
            body = _unpacked(body, encoding, self._origin)
            dropped = dropped | {"content-encoding", "content-length"}
        headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in response.raw_headers]
        return UpstreamResponse(
            response.status, _end_to_end(headers, dropped), body, response.close
        )

    def _headers(self, call: UpstreamCall) -> list[tuple[str, str]]:
        dropped = self._dropped
        if call.readable:
            dropped = dropped | {"accept-encoding"}
        if isinstance(call.body, bytes):
            dropped = dropped | {"content-length"}
        headers = [(name, _utf8(value)) for name, value in _end_to_end(call.headers, dropped)]
        if self._authorization:
            headers.append(("authorization", self._authorization))
        if call.readable:
            headers.append(("accept-encoding", "identity"))
        return headers


class _Body:
    """The bytes of a response as they arrive, with the errors of the connection made ours."""

    __slots__ = ("_content", "_origin")

    def __init__(self, content: aiohttp.StreamReader, origin: str) -> None:
        self._content = content
        self._origin = origin

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            chunk = await self._content.readany()
        except (aiohttp.ClientError, OSError) as error:
            raise _explained(error, self._origin) from error
        if not chunk:
            raise StopAsyncIteration
        return chunk


@lru_cache(maxsize=128)
def _url(base: str, path: str, query: str) -> URL:
    segments = unquote(path).replace("\\", "/").split("/")
    if not (_PATH.fullmatch(path) and _QUERY.fullmatch(query)) or {".", ".."} & set(segments):
        raise InvalidRequest(f"The path {path[:200]!r} cannot be forwarded.", code="invalid_path")
    return URL(f"{base}{path}?{query}" if query else base + path, encoded=True)


def _utf8(value: str) -> str:
    """Undo our server's reading of a value as Latin-1, because aiohttp writes UTF-8."""
    return value if value.isascii() else value.encode("latin-1", "replace").decode(errors="replace")


def _payload(
    body: bytes | AsyncIterator[bytes],
) -> bytes | io.BytesIO | AsyncIterator[bytes] | None:
    """Give aiohttp large bodies as a file, which it writes piece by piece."""
    if isinstance(body, bytes) and len(body) > _LARGE_BODY_BYTES:
        return io.BytesIO(body)
    return body or None


def _end_to_end(
    headers: Sequence[tuple[str, str]], dropped: frozenset[str]
) -> list[tuple[str, str]]:
    """Keep the headers meant for the other end (RFC 9110 section 7.6.1), and never our own; names in lower case."""
    kept = []
    for name, value in headers:
        key = name.lower()
        if key == "connection":
            dropped = dropped | {token.strip().lower() for token in value.split(",")}
        elif key not in dropped and not key.startswith("x-holdgate-"):
            kept.append((key, value))
    if dropped.isdisjoint(key for key, _ in kept):
        return kept
    return [(key, value) for key, value in kept if key not in dropped]


def _explained(error: Exception, origin: str) -> UpstreamError:
    """Return an error of the connection as one of ours, without headers, paths or queries."""
    match error:
        case aiohttp.ConnectionTimeoutError():
            message = f"{origin} did not accept a connection in time."
        case TimeoutError():
            return UpstreamTimeout(f"{origin} did not answer in time.")
        case aiohttp.ClientSSLError() | ssl.SSLError() | aiohttp.ServerFingerprintMismatch():
            message = f"No trusted TLS connection to {origin} can be made."
        case aiohttp.ClientConnectorError():
            fault = error.os_error
            number = fault.errno or 0  # a name server's are below zero
            reason = os.strerror(number) if number > 0 else fault.strerror or type(fault).__name__
            message = f"Could not connect to {origin}: {reason}."
        case aiohttp.ServerDisconnectedError():
            message = f"{origin} closed the connection before it answered."
        case aiohttp.ClientPayloadError():
            message = f"{origin} broke off in the middle of its response."
        case aiohttp.ClientResponseError():
            message = f"{origin} sent something that is not HTTP."
        case _:
            message = f"The connection to {origin} failed ({type(error).__name__})."
    return UpstreamError(message)


async def _unpacked(
    packed: AsyncIterator[bytes], encoding: str, origin: str
) -> AsyncIterator[bytes]:
    """What a provider packed though it was asked not to, in pieces of bounded size."""
    unpack = _UNPACKING.get(encoding.strip().lower())
    message = f"{origin} packed its response in a way that cannot be read, though it was asked not to pack it."
    try:
        if unpack is None:
            raise ValueError(encoding)
        unpacking = unpack()
        async for data in packed:
            for piece in unpacking.feed(data):
                yield piece
        unpacking.finish()
    except (ValueError, zlib.error, zstandard.ZstdError) as error:
        raise UpstreamError(message) from error


class _Zlib:
    """Unpacks gzip (RFC 1952), or what HTTP calls deflate (RFC 9110, section 8.4.1.2), with zlib's header or without."""

    def __init__(self, *, is_gzip: bool) -> None:
        self._wbits = 31 if is_gzip else None
        self._unpacking: zlib._Decompress | None = None

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What can be told now that more has come."""
        while data:
            if self._unpacking is None:
                self._wbits = self._wbits or (15 if data[0] & 15 == 8 else -15)
                self._unpacking = zlib.decompressobj(self._wbits)
            if piece := self._unpacking.decompress(data, _PIECE_BYTES):
                yield piece
            data = self._unpacking.unconsumed_tail
            if self._unpacking.eof:
                # The next member of a gzip file, or nothing.
                data, self._unpacking = self._unpacking.unused_data, None

    def finish(self) -> None:
        """Raise `ValueError` if something is missing."""
        if self._unpacking is not None:
            raise ValueError("the end is missing")


class _Zstd:
    """Unpacks a zstd frame (RFC 8878)."""

    def __init__(self) -> None:
        opened = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW_BYTES)
        self._unpacking = opened.decompressobj()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """What can be told now that more has come."""
        for start in range(0, len(data), _ZSTD_BYTES):
            if piece := self._unpacking.decompress(data[start : start + _ZSTD_BYTES]):
                yield piece

    def finish(self) -> None:
        """Raise `ValueError` if something is missing."""
        if not self._unpacking.eof:
            raise ValueError("the end is missing")


_UNPACKING: dict[str, Callable[[], _Zlib | _Zstd]] = {
    "gzip": lambda: _Zlib(is_gzip=True),
    "x-gzip": lambda: _Zlib(is_gzip=True),
    "deflate": lambda: _Zlib(is_gzip=False),
    "zstd": _Zstd,
}
