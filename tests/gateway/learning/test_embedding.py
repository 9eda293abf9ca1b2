"""Embeddings for the weekly report: asked for as everything else, whole or not at all, and only of what may be shown."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.errors import GatewayError, UpstreamError, UpstreamTimeout
from gateway.learning.embedding import embedded
from gateway.records import Verdict
from gateway.store import SqlStore, open_store
from tests.conftest import UpstreamCalls
from tests.fakes import Says
from tests.gateway.court import Models
from tests.gateway.learning.reviewed import POLICIES, asks, judge
from tests.gateway.learning.test_exports import POLICY, run
from tests.gateway.learning.test_learn import report
from tests.gateway.rig import chat
from tests.processes import Server, write_config
from tests.services import new_sqlite


def gives(*vectors: list[Any], first: int = 0) -> Says:
    """A reply with these embeddings, the last of them first."""
    data = [{"index": first + at, "embedding": each} for at, each in enumerate(vectors)]
    return Says(orjson.dumps({"object": "list", "data": data[::-1], "usage": {"total_tokens": 1}}))


async def test_embeddings_come_in_the_order_of_the_texts_whatever_that_of_the_reply() -> None:
    models = Models(e=[gives([1.0, 0], [0, 2.0])])
    assert await embedded(models, "e", ["a", ""]) == [[1.0, 0.0], [0.0, 2.0]]
    assert models.body() == {"model": "e", "input": ["a", "-"]}
    assert (models.calls[0].method, models.calls[0].path) == ("POST", "/embeddings")


async def test_texts_are_sent_cut_short_and_so_many_at_a_time() -> None:
    models = Models(e=[gives(*[[1.0]] * 64), gives(*[[2.0]] * 6)])
    found = await embedded(models, "e", ["x" * 10_000] * 70)
    assert found == [[1.0]] * 64 + [[2.0]] * 6
    assert [len(models.body(n)["input"]) for n in (0, 1)] == [64, 6]
    assert {len(text) for text in models.body(0)["input"]} == {4000}


async def test_of_no_texts_nobody_is_asked() -> None:
    models = Models(e=[gives()])
    assert await embedded(models, "e", []) == []
    assert models.calls == []


WRONG: dict[str, tuple[Says | GatewayError, str]] = {
    "no JSON": (Says(b"{"), "are no embeddings"),
    "a chat completion": (Says(chat("hello")), "are no embeddings"),
    "words": (gives(["a"], ["b"]), "are no embeddings"),
    "too few": (gives([1.0]), "1 embeddings that do not belong to the 2 texts"),
    "of other texts": (gives([1.0], [1.0], first=1), "do not belong to the 2 texts"),
    "none in one": (gives([1.0], []), "empty, too long or not finite"),
    "not finite": (Says(gives([1.0], [2.0]).parts[0].replace(b"2.0", b"1e999")), "embeddings"),
    "too long": (gives([1.0] * 20_000, [1.0] * 20_000), "empty, too long or not finite"),
    "of two lengths": (gives([1.0], [1.0, 2.0]), "differ in length"),
    "refused": (
        Says(b'{"error": {"code": "model_not_found", "message": "x"}}', status=404),
        "gave no embeddings: it answered 404 (model_not_found)",
    ),
    "too late": (UpstreamTimeout("h did not answer in time."), "did not answer in time"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_what_is_not_embeddings_is_an_error_and_nothing_comes_of_it(case: str) -> None:
    answer, says = WRONG[case]
    with pytest.raises(GatewayError) as raised:
        await embedded(Models(e=[answer]), "e", ["a", "b"])
    assert says in raised.value.message


async def test_only_what_the_report_may_show_is_sent(store: SqlStore) -> None:
    for policy in ("full", "redacted", "digest", "gone"):
        for number in range(2):
            canary = asks(f"CANARY {policy} {number}")
            await judge(store, Verdict.REJECT, policy=f"{policy}@1", request=canary, reason="wrong")
    sent: list[str] = []

    async def embed(texts: Any) -> list[list[float]]:
        sent.extend(texts)
        return [[1.0, 0.0] for _ in texts]

    found = await report(store, embedding=("m", embed))
    assert found.now.mistakes == 8
    assert sorted(text.split("\n")[0] for text in sent) == ["CANARY full 0", "CANARY full 1"]
    assert found.embedded_by == "m"
    assert len(POLICIES) == 3


async def test_if_the_model_fails_there_is_no_report(store: SqlStore) -> None:
    await judge(store, Verdict.REJECT)

    async def embed(texts: Any) -> list[list[float]]:
        raise UpstreamError("no")

    with pytest.raises(UpstreamError):
        await report(store, embedding=("m", embed))


@asynccontextmanager
async def mistakes_of_today(
    folder: Path, upstream_url: str, **settings: Any
) -> AsyncIterator[Path]:
    """The settings of a gateway whose store has six mistakes about parcels and four about plans."""
    url = new_sqlite(folder / "holdgate.db")
    config = write_config(
        folder,
        upstream_url=upstream_url,
        policies={"full": POLICY},
        store_url=url,
        **settings,
    )
    store, now = await open_store(url), datetime.now(UTC) - timedelta(hours=1)
    parcel = "where is my parcel and when does the courier bring it"
    plan = "what does the annual plan cost with a discount"
    for text, count in ((parcel, 6), (plan, 4)):
        for number in range(count):
            asked = asks(f"{text} {number}")
            await judge(
                store, Verdict.REJECT, reason="wrong", request=asked, response=chat(text), at=now
            )
    yield config
    await store.close()


async def test_command_groups_by_the_embeddings_of_a_configured_model(
    upstream: Server,
    upstream_calls: UpstreamCalls,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = {
        "match": "text-embedding-3-small",
        "base_url": f"{upstream.url}/v1",
        "api_key_env": "EMBEDDING_KEY",
    }
    async with mistakes_of_today(tmp_path, upstream.url, models=[model]) as config:
        file, named = tmp_path / "r.html", ("--embeddings", "text-embedding-3-small")
        done = run(config, "learn", "report", "-o", str(file), *named)
        assert done.returncode == 1
        assert "EMBEDDING_KEY" in done.stderr
        monkeypatch.setenv("EMBEDDING_KEY", "sk-embed")
        done = run(config, "learn", "report", "-o", str(file), *named)
        assert done.returncode == 0, done.stderr
        (call,) = upstream_calls(finished=1)
        assert (call["method"], call["path"]) == ("POST", "/v1/embeddings")
        assert call["headers"]["authorization"] == "Bearer sk-embed"
        text = file.with_suffix(".md").read_text()
        assert "grouped by embeddings of text-embedding-3-small" in text
        assert "6 responses of full" in text
        assert "4 responses of full" in text
        done = run(config, "learn", "report", "-o", str(file), "--embeddings", "unknown-1")
        assert done.returncode == 1
        assert "unknown-1" in done.stderr
        assert "is not served here" in done.stderr


async def test_command_says_that_the_provider_failed_and_writes_nothing(tmp_path: Path) -> None:
    async with mistakes_of_today(tmp_path, "http://127.0.0.1:9") as config:
        file = tmp_path / "r.html"
        done = run(config, "learn", "report", "-o", str(file), "--embeddings", "e")
        assert done.returncode == 1
        assert "Could not connect to http://127.0.0.1:9" in done.stderr
        assert "without --embeddings" in done.stderr
        assert "Traceback" not in done.stderr
        assert not file.exists()
