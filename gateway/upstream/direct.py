"""Providers of the OpenAI dialect: original bytes there and back over kept connections."""

from __future__ import annotations

import re
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import lru_cache
from urllib.parse import unquote

import zstandard
from yarl import URL

from gateway.connections import Server
from gateway.errors import InvalidRequest, UpstreamError
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

#: So much of a packed body is unpacked at a time, and so much of a zstd frame is: four bytes of it may stand for 128 KiB.
_PIECE_BYTES = 2**18
_ZSTD_BYTES = 64
_ZSTD_WINDOW_BYTES = 2**23  # what every decoder should accept (RFC 8878, section 3.1.1.1.2)


class DirectUpstream:
    """A server of the OpenAI dialect, as a model entry describes it. To be used on one event loop."""

    def __init__(self, entry: ModelEntry, api_key: str | None) -> None:
        base = URL(entry.base_url or OPENAI_URL)
        self._server = Server(base, entry.timeout_s)
        self._path = base.raw_path.rstrip("/")
        self._authorization = f"Bearer {api_key}" if api_key else None
        self._dropped = _NOT_SENT | {"authorization"} if api_key else _NOT_SENT

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        """See `gateway.ports.Upstream`. A key of the entry replaces the client's `Authorization`.

        Raises `InvalidRequest` if the path would leave the base URL.
        """
        target = self._path + _target(call.path, call.query)
        incoming = await self._server.ask(call.method, target, self._headers(call), call.body)
        encoding = dict(incoming.headers).get("content-encoding", "") if call.readable else ""
        body: AsyncIterator[bytes] = incoming
        dropped = _NOT_RELAYED
        if encoding:
            body = _unpacked(incoming, encoding, self._server.origin)
            dropped = dropped | {"content-encoding", "content-length"}
        headers = _end_to_end(incoming.headers, dropped)
        return UpstreamResponse(incoming.status, headers, body, incoming.close)

    def _headers(self, call: UpstreamCall) -> list[tuple[str, str]]:
        dropped = self._dropped
        if call.readable:
            dropped = dropped | {"accept-encoding"}
        if isinstance(call.body, bytes):
            dropped = dropped | {"content-length"}
        headers = _end_to_end(call.headers, dropped)
        if self._authorization:
            headers.append(("authorization", self._authorization))
        if call.readable:
            headers.append(("accept-encoding", "identity"))
        return headers

    async def close(self) -> None:
        """Close every connection."""
        await self._server.close()


@lru_cache(maxsize=128)
def _target(path: str, query: str) -> str:
    segments = unquote(path).replace("\\", "/").split("/")
    if not (_PATH.fullmatch(path) and _QUERY.fullmatch(query)) or {".", ".."} & set(segments):
        raise InvalidRequest(f"The path {path[:200]!r} cannot be forwarded.", code="invalid_path")
    return f"{path}?{query}" if query else path


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
