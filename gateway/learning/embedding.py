"""What texts are alike, as a model tells it: embeddings, asked for over the same way to the providers as everything else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from math import isfinite

import msgspec
import orjson

from gateway.errors import GatewayError, UpstreamError
from gateway.interviews import error_code
from gateway.learning.weekly import Embed
from gateway.ports import Models, UpstreamCall
from gateway.settings import Settings
from gateway.upstream.routing import Router

_TEXTS_AT_ONCE = 64
_TEXT_CHARS = 4000
_REPLY_BYTES = 64 * 2**20
_MOST_NUMBERS = 16_384
_PATIENCE_S = 120.0
_HEADERS = (("content-type", "application/json"),)

#: Providers refuse a text without a character.
_NOTHING = "-"


@asynccontextmanager
async def embedder(settings: Settings, model: str) -> AsyncIterator[Embed]:
    """A way to ask a model for embeddings, of the provider that the settings name for it; see `embedded`."""
    router = Router(settings)

    async def embed(texts: Sequence[str]) -> list[list[float]]:
        try:
            return await embedded(router, model, texts)
        except GatewayError as error:
            hint = "There is no report; without --embeddings responses are grouped by their words."
            raise UpstreamError(f"{error.message} {hint}") from error

    try:
        yield embed
    finally:
        await router.close()


class _Embedding(msgspec.Struct):
    index: int
    embedding: list[float]


class _Reply(msgspec.Struct):
    data: list[_Embedding]


async def embedded(models: Models, model: str, texts: Sequence[str]) -> list[list[float]]:
    """The embedding of each text by a model: as many lists of finite numbers, all of one length.

    Of each text the first 4,000 characters are sent, 64 texts a call.

    Raises
    ------
    GatewayError
        If nobody serves the model, its provider cannot be reached or answers with an error, or what it sends is no such list.
        There is nothing then: never some of them.
    """
    found: list[list[float]] = []
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = [text[:_TEXT_CHARS].strip() or _NOTHING for text in texts[start:][:_TEXTS_AT_ONCE]]
        found += _read(model, await _sent(models, model, some), len(some))
    if len({len(each) for each in found}) > 1:
        raise UpstreamError(f"The embeddings that the provider of {model} sent differ in length.")
    return found


async def _sent(models: Models, model: str, texts: Sequence[str]) -> bytes:
    body = orjson.dumps({"model": model, "input": texts})
    response = await models.send(
        UpstreamCall(
            "POST",
            "/embeddings",
            body=body,
            headers=_HEADERS,
            model=model,
            readable=True,
            patience_s=_PATIENCE_S,
        )
    )
    answer = await response.read(_REPLY_BYTES)
    if not 200 <= response.status < 300:
        code = error_code(answer)
        raise UpstreamError(
            f"The provider of {model} gave no embeddings: it answered {response.status}{f' ({code})' if code else ''}."
        )
    return answer


def _read(model: str, answer: bytes, count: int) -> list[list[float]]:
    try:
        data = msgspec.json.decode(answer, type=_Reply).data
    except msgspec.MsgspecError as error:
        raise UpstreamError(f"What the provider of {model} sent are no embeddings.") from error
    if sorted(each.index for each in data) != list(range(count)):
        raise UpstreamError(
            f"The provider of {model} sent {len(data)} embeddings that do not belong to the {count} texts it was sent."
        )
    vectors = [each.embedding for each in sorted(data, key=lambda each: each.index)]
    if not all(0 < len(each) <= _MOST_NUMBERS and all(map(isfinite, each)) for each in vectors):
        raise UpstreamError(
            f"The embeddings that the provider of {model} sent are empty, too long or not finite."
        )
    return vectors
