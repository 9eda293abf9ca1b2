"""What people decided comes out as others read it: whole, checked, in one order, and no more of it than the policy lets out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import orjson
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import TypeAdapter, ValidationError

from gateway import wire
from gateway.calibrating.labels import read_labelled
from gateway.evaluation.cases import read_cases
from gateway.learning import exporting
from gateway.learning.chat import Conversation, NotChat, answer_of, conversation
from gateway.learning.exporting import Line, lines, written
from gateway.learning.samples import Sample, samples, weight
from gateway.records import TaskKind, Verdict
from gateway.store import SqlStore, open_store
from tests.gateway.learning.reviewed import POLICIES, asks, judge, say
from tests.gateway.rig import chat
from tests.gateway.stores import a_decision, later
from tests.processes import write_config
from tests.services import new_sqlite

MESSAGES: TypeAdapter[Any] = TypeAdapter(list[ChatCompletionMessageParam])


async def export(
    store: SqlStore, form: Callable[[Sample], list[Line]], **which: Any
) -> tuple[list[Any], Counter[str]]:
    """The lines of an export, read again, and what was left out."""
    left_out: Counter[str] = Counter()
    found = lines(samples(store, POLICIES, **which), form, left_out)
    return [orjson.loads(line) async for line in found], left_out


class TestFormats:
    async def test_sft_teaches_what_was_approved_or_written_by_a_person(
        self, store: SqlStore
    ) -> None:
        await judge(store, Verdict.APPROVE, response=chat("Five."))
        await judge(store, Verdict.CORRECT, correction=chat("Six."))
        await judge(store, Verdict.REJECT)
        found, left_out = await export(store, exporting.sft)
        assert [line["messages"][-1] for line in found] == [
            {"role": "assistant", "content": text, "weight": 1} for text in ("Five.", "Six.")
        ]
        assert left_out == {"rejected, not corrected": 1}
        for line in found:
            Conversation.model_validate(line)
            MESSAGES.validate_python(line["messages"])

    async def test_preference_prefers_the_correction_to_the_answer(self, store: SqlStore) -> None:
        await judge(store, Verdict.CORRECT, correction=chat("Six."))
        await judge(store, Verdict.APPROVE)
        (line,), left_out = await export(store, exporting.preference)
        assert line == {
            "input": {"messages": [{"role": "user", "content": "How much?"}]},
            "preferred_output": [{"role": "assistant", "content": "Six."}],
            "non_preferred_output": [{"role": "assistant", "content": "Five."}],
        }
        assert left_out == {"not corrected": 1}

    async def test_kto_tells_desirable_from_undesirable(self, store: SqlStore) -> None:
        await judge(store, Verdict.APPROVE, response=chat("a"))
        await judge(store, Verdict.REJECT, response=chat("b"))
        await judge(store, Verdict.CORRECT, response=chat("c"), correction=chat("d"))
        found, _ = await export(store, exporting.kto)
        assert [(line["completion"][0]["content"], line["label"]) for line in found] == [
            ("a", True),
            ("b", False),
            ("c", False),
            ("d", True),
        ]
        assert {tuple(line) for line in found} == {("prompt", "completion", "label")}

    async def test_eval_is_what_judge_eval_reads(self, store: SqlStore, tmp_path: Path) -> None:
        first = await judge(store, Verdict.APPROVE)
        second = await judge(store, Verdict.REJECT, response=chat("Wrong."))
        file = tmp_path / "eval.jsonl"
        found, _ = await export(store, exporting.judged)
        file.write_bytes(b"\n".join(map(orjson.dumps, found)))
        cases = read_cases(file)
        assert [(c.id, c.acceptable, c.answer, c.group) for c in cases] == [
            (first, True, "Five.", "full"),
            (second, False, "Wrong.", "full"),
        ]

    async def test_labels_are_what_calibrate_fit_reads_and_hold_no_content(
        self, store: SqlStore, tmp_path: Path
    ) -> None:
        signals = {"mean_logprob": -0.25}
        detail: dict[str, Any] = {"evidence": {"signals": signals, "results": {}}}
        words: dict[str, Any] = {"request": asks("CANARY"), "response": chat("CANARY")}
        known = await judge(
            store, Verdict.REJECT, detail=detail, confidence=0.4, policy="digest@1", **words
        )
        await judge(store, Verdict.REJECT, policy="gone@1")
        told = a_decision(policy="full@1", **words)
        await store.record(told)
        await say(store, told.id, acceptable=True)
        found, left_out = await export(store, exporting.labels(POLICIES))
        file = tmp_path / "labels.jsonl"
        file.write_bytes(b"\n".join(map(orjson.dumps, found)))
        (row,) = read_labelled(file)
        assert (row.id, row.acceptable, row.signals, row.inclusion) == (known, False, signals, 1.0)
        assert b"CANARY" not in file.read_bytes()
        assert left_out == {
            "its policy is gone": 1,
            "nobody knows how likely it was to be labelled": 1,
        }


class TestContent:
    async def test_what_a_policy_masks_is_masked_and_what_it_does_not_keep_is_left_out(
        self, store: SqlStore
    ) -> None:
        for content in (*POLICIES, "gone"):
            await judge(
                store,
                Verdict.CORRECT,
                policy=f"{content}@1",
                request=asks("I am ann@example.com"),
                correction=chat("Hello ann@example.com"),
            )
        found, left_out = await export(store, exporting.preference)
        assert ["ann@example.com" in json.dumps(line) for line in found] == [True, False, False]
        assert all("I am" in json.dumps(line) for line in found)
        assert left_out == {"no content kept": 1}

    async def test_erased_content_is_left_out(self, store: SqlStore) -> None:
        decision = a_decision(policy="full@1", request=asks(), response=chat("Five."))
        await store.record(decision, erase_at=later(1))
        await say(store, decision.id, acceptable=True)
        await store.erase_due(later(2), 10)
        for form in (exporting.sft, exporting.kto, exporting.judged):
            assert await export(store, form) == ([], {"no content kept": 1})

    async def test_label_that_disagrees_with_its_review_is_left_out(self, store: SqlStore) -> None:
        decision_id = await judge(store, Verdict.APPROVE, kind=TaskKind.AUDIT)
        assert len((await export(store, exporting.sft))[0]) == 1
        await say(store, decision_id, acceptable=False)
        assert await export(store, exporting.sft) == ([], {"its labels disagree": 1})

    @pytest.mark.parametrize(
        "response",
        [b"", b"not json", b"[]", b"{}", b'{"choices": 7}', b"\xff", chat("a", "b"), chat(None)],
    )
    async def test_what_cannot_be_read_is_counted_and_stops_nothing(
        self, store: SqlStore, response: bytes
    ) -> None:
        recorded = await judge(store, Verdict.APPROVE, request=b"[", response=chat("x"))
        assert recorded
        await judge(store, Verdict.APPROVE, request=asks(), response=response or b" ")
        await judge(store, Verdict.APPROVE)
        found, left_out = await export(store, exporting.sft)
        assert (len(found), left_out.total()) == (1, 2)


class TestOrder:
    async def test_same_labels_give_the_same_bytes_whatever_the_order_of_reviews(
        self, store: SqlStore
    ) -> None:
        ids = [await judge(store, Verdict.APPROVE, id=f"hgd_x{n:03}") for n in (7, 1, 120, 4)]
        found, _ = await export(store, exporting.judged)
        assert [line["id"] for line in found] == sorted(ids)
        assert (await export(store, exporting.judged))[0] == found

    async def test_since_and_policy_select(self, store: SqlStore) -> None:
        await judge(store, Verdict.APPROVE)
        wanted = await judge(store, Verdict.APPROVE, policy="redacted@1")
        found, _ = await export(store, exporting.judged, policy="redacted")
        assert [line["id"] for line in found] == [wanted]
        assert len((await export(store, exporting.judged, since=later(60)))[0]) == 2
        assert (await export(store, exporting.judged, since=later(60.1)))[0] == []


TOOL = {"name": "pay", "parameters": {"type": "object"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "pay", "arguments": '{"n": 1}'}}
ANSWER = {"role": "assistant", "content": "Done."}


class TestConversation:
    def test_only_the_last_answer_is_learnt_and_tools_are_kept(self) -> None:
        request: dict[str, Any] = {
            "messages": [
                {"role": "developer", "content": "Be brief."},
                {"role": "user", "content": [{"type": "text", "text": "Pay."}]},
                {"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None},
                {"role": "tool", "tool_call_id": "c1", "content": "ok"},
            ],
            "tools": [{"type": "function", "function": TOOL}],
            "parallel_tool_calls": False,
            "temperature": 0,
        }
        found = conversation(wire.CHAT, request, ANSWER)
        assert found["messages"] == [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Pay."}]},
            {"role": "assistant", "tool_calls": [CALL], "weight": 0},
            {"role": "tool", "tool_call_id": "c1", "content": "ok"},
            {"role": "assistant", "content": "Done.", "weight": 1},
        ]
        assert found["tools"] == request["tools"]
        assert found["parallel_tool_calls"] is False

    def test_items_of_a_response_become_messages(self) -> None:
        request: dict[str, Any] = {
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Pay."}]},
                {"type": "reasoning", "id": "r", "summary": []},
                {"type": "function_call", "call_id": "c1", "name": "pay", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "ok"},
            ],
            "tools": [{"type": "function", "strict": True, **TOOL}],
        }
        said = {"type": "message", "role": "assistant", "content": [
            {"type": "output_text", "text": "Done.", "annotations": []}]}  # fmt: skip
        body = orjson.dumps({"output": [{"type": "reasoning", "summary": []}, said]})
        found = conversation(wire.RESPONSES, request, answer_of(wire.RESPONSES, body))
        assert [message["role"] for message in found["messages"]] == [
            "system",
            "user",
            "assistant",
            "tool",
            "assistant",
        ]
        assert found["messages"][2]["tool_calls"][0]["function"]["name"] == "pay"
        assert found["tools"] == [{"type": "function", "function": {**TOOL, "strict": True}}]

    def test_completion_is_a_question_and_an_answer(self) -> None:
        answer = answer_of(wire.COMPLETIONS, b'{"choices": [{"text": "Paris"}]}')
        found = conversation(wire.COMPLETIONS, {"prompt": "France?"}, answer)
        assert [m["content"] for m in found["messages"]] == ["France?", "Paris"]

    @pytest.mark.parametrize(
        "request_",
        [
            {},
            {"messages": []},
            {"messages": "hello"},
            {"messages": [{"role": "robot", "content": "x"}]},
            {"messages": [{"role": "user"}]},
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            {"messages": [{"role": "user", "content": "x"}, {"role": "tool", "content": "y"}]},
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [CALL]}]},
            {"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "web_search"}]},
        ],
    )  # fmt: skip
    def test_what_fine_tuning_does_not_take_is_refused(self, request_: dict[str, Any]) -> None:
        with pytest.raises(NotChat):
            conversation(wire.CHAT, request_, ANSWER)

    @pytest.mark.parametrize(
        "change",
        [
            {"messages": [ANSWER]},
            {"messages": [{"role": "user", "content": "x"}]},
            {"extra": 1},
            {"tools": []},
            {"messages": [{"role": "user", "content": "x"}, {**ANSWER, "weight": 2}]},
            {"messages": [{"role": "user", "content": "x"}, {**ANSWER, "weight": 0}]},
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
        ],
    )
    def test_validator_refuses_lines_that_fine_tuning_does(self, change: dict[str, Any]) -> None:
        good = {"messages": [{"role": "user", "content": "x"}, ANSWER]}
        Conversation.model_validate(good)
        with pytest.raises(ValidationError):
            Conversation.model_validate(good | change)


def test_weight_is_that_of_uncertainty() -> None:
    assert [round(weight(c), 2) for c in (0.0, 0.09, 0.99, None)] == [100.0, 10.0, 1.0, 0.99]


def test_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "out.jsonl"
    file.write_text("before")

    def fail() -> None:
        with written(file) as out:
            out.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["out.jsonl"]
    with written(file) as out:
        out.write(b"whole")
    assert file.read_text() == "whole"
    assert file.stat().st_mode & 0o077 == 0


POLICY = "policy: full\nconfidence: {source: none, when_uncalibrated: return}\n"


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[tuple[Path, SqlStore]]:
    """The settings of a gateway, and its store."""
    url = new_sqlite(tmp_path / "holdgate.db")
    config = write_config(
        tmp_path, upstream_url="http://h", policies={"full": POLICY}, store_url=url
    )
    store = await open_store(url)
    yield config, store
    await store.close()


def run(config: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command line."""
    command = [sys.executable, "-m", "gateway.cli", *args, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


async def test_command_writes_the_file_and_says_what_it_left_out(
    shop: tuple[Path, SqlStore], tmp_path: Path
) -> None:
    config, store = shop
    await judge(store, Verdict.APPROVE)
    await judge(store, Verdict.REJECT)
    done = run(config, "export", "--format", "sft", "-o", str(tmp_path / "sft.jsonl"))
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.split("\n")[0] == "1 lines. Left out: 1 rejected, not corrected."
    assert len((tmp_path / "sft.jsonl").read_text().splitlines()) == 1
    piped = run(config, "export", "--format", "eval")
    assert len(piped.stdout.splitlines()) == 2
    assert run(config, "export", "--format", "eval", "--since", "soon").returncode == 1
    missing = run(config, "export", "--format", "eval", "-o", str(tmp_path / "no" / "x"))
    assert missing.returncode == 1
    assert "cannot be written" in missing.stderr
    assert "Traceback" not in missing.stderr
