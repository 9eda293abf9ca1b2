"""Labels: files of them, and what people decided in review."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.evaluation.cases import CaseError, attacks, exchanged, read_cases, reviewed_cases
from gateway.records import Verdict
from gateway.store import SqlStore
from tests.gateway.stores import a_resolution, a_task, put

MESSAGES = [{"role": "user", "content": "What is 2 + 2?"}]
REQUEST = {"model": "gpt-4o", "messages": MESSAGES, "metadata": {"reference": "4", "task": "sums"}}
RESPONSE = {
    "model": "gpt-4o-2024",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "5"}}],
}


def written(folder: Path, *lines: object) -> Path:
    path = folder / "labels.jsonl"
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("\n".join(texts) + "\n")
    return path


class TestFiles:
    def test_a_whole_exchange_is_read_as_the_gateway_would(self, tmp_path: Path) -> None:
        line = {"id": "a", "request": REQUEST, "response": RESPONSE, "acceptable": False}
        [case] = read_cases(written(tmp_path, line | {"group": "easy"}))
        assert (case.id, case.acceptable, case.group, case.answer) == ("a", False, "easy", "5")
        assert case.exchange.endpoint == "chat"
        assert case.exchange.model == "gpt-4o-2024"
        assert case.exchange.task == "sums"
        assert case.exchange.context["reference"] == "4"
        assert case.exchange.request == REQUEST

    def test_messages_and_an_answer_are_enough(self, tmp_path: Path) -> None:
        [case] = read_cases(written(tmp_path, {"id": "a", "messages": MESSAGES, "answer": "4"}, ""))
        assert case.answer == "4"
        assert case.acceptable is None

    def test_a_responses_body_is_of_its_endpoint(self, tmp_path: Path) -> None:
        said = {"type": "message", "content": [{"type": "output_text", "text": "4"}]}
        line = {"id": "a", "request": {"input": "2 + 2?"}, "response": {"output": [said]}}
        [case] = read_cases(written(tmp_path, line))
        assert case.exchange.endpoint == "responses"
        assert case.answer == "4"

    def test_a_changed_answer_has_another_digest(self, tmp_path: Path) -> None:
        lines = [{"id": str(n), "messages": MESSAGES, "answer": n} for n in "445"]
        lines[1]["id"] = "again"
        first, same, other = read_cases(written(tmp_path, *lines))
        assert first.digest == same.digest != other.digest

    @pytest.mark.parametrize(
        ("line", "says"),
        [
            ("{", ":2: Invalid JSON"),
            ({"id": "b"}, ":2: write either request or messages"),
            ({"id": "b", "messages": MESSAGES}, ":2: write either response or answer"),
            ({"id": "b", "messages": MESSAGES, "answer": "x", "ok": True}, ":2: ok: Extra inputs"),
            (
                {"id": "b", "messages": MESSAGES, "answer": "x", "acceptable": 1},
                ":2: acceptable: Input should be a valid boolean",
            ),
            ({"id": "b", "request": {}, "answer": "x"}, ":2: request: it has none of messages"),
            ({"id": "b", "request": REQUEST, "response": {"choices": 1}}, ":2: The provider's"),
            ({"id": "a", "messages": MESSAGES, "answer": "x"}, ":2: the id 'a' came before"),
        ],
        ids=lambda value: value if isinstance(value, str) and value.startswith(":") else "",
    )
    def test_a_wrong_line_is_named(self, tmp_path: Path, line: object, says: str) -> None:
        path = written(tmp_path, {"id": "a", "messages": MESSAGES, "answer": "4"}, line)
        with pytest.raises(CaseError) as raised:
            read_cases(path)
        assert f"{path}{says}" in str(raised.value)

    def test_a_file_without_cases_or_none_at_all_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(CaseError, match="no cases"):
            read_cases(written(tmp_path, ""))
        with pytest.raises(CaseError, match="cannot be read"):
            read_cases(tmp_path / "absent.jsonl")


def test_answer_and_reference_change_places(tmp_path: Path) -> None:
    line = {"id": "a", "request": REQUEST, "response": RESPONSE}
    [case] = read_cases(written(tmp_path, line))
    other = exchanged(case, "reference")
    assert other is not None
    assert other.answer == "4"
    assert other.exchange.context["reference"] == "5"
    assert other.digest != case.digest
    assert exchanged(case, "absent") is None


def test_every_attack_has_an_honest_twin_to_the_same_question() -> None:
    corpus = attacks()
    assert len(corpus) >= 150
    for each in corpus:
        assert each.attack.exchange.request == each.honest.exchange.request
        assert each.attack.answer != each.honest.answer
    assert len({each.attack.id for each in corpus}) == len(corpus)


class TestReviews:
    async def resolved(self, store: SqlStore, verdict: Verdict, **decision: Any) -> str:
        recorded, task_id = await put(store, a_task(inclusion=0.15), **decision)
        correction = b"{}" if verdict is Verdict.CORRECT else None
        await store.resolve(a_resolution(task_id, verdict=verdict, correction=correction))
        return recorded.id

    async def test_labels_come_in_chunks_with_their_decisions(self, store: SqlStore) -> None:
        ids = [await self.resolved(store, Verdict.APPROVE) for _ in range(5)]
        await put(store, a_task())
        first = await store.labelled("", 3)
        rest = await store.labelled(first[-1].decision.id, 3)
        assert [each.decision.id for each in (*first, *rest)] == ids
        assert {each.inclusion for each in first} == {0.15}
        assert not await store.labelled(rest[-1].decision.id, 3)

    async def test_what_people_decided_is_whether_the_answer_was_acceptable(
        self, store: SqlStore
    ) -> None:
        bodies = {"request": orjson.dumps(REQUEST), "response": orjson.dumps(RESPONSE)}
        labels = {}
        for verdict in Verdict:
            labels[await self.resolved(store, verdict, **bodies)] = verdict is Verdict.APPROVE
        cases, empty = await reviewed_cases(store)
        assert {case.id: case.acceptable for case in cases} == labels
        assert {case.answer for case in cases} == {"5"}
        assert {case.group for case in cases} == {"refunds@1"}
        assert empty == 0

    async def test_decisions_without_contents_or_answer_are_counted(self, store: SqlStore) -> None:
        await self.resolved(store, Verdict.REJECT)
        unreadable = {"request": orjson.dumps(REQUEST), "response": b"<html>502</html>"}
        await self.resolved(store, Verdict.REJECT, **unreadable)
        assert await reviewed_cases(store) == ([], 2)
