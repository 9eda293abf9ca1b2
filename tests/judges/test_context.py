"""What of a request a judge sees, in each of the three forms that requests have."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from judges.context import ContextPart, answer_parts, request_parts
from tests.judges.build import answered
from validators import JSON, Choice, Exchange, Passage

TOOLS: JSON = [{"type": "function", "function": {"name": "search"}}]
CALL: JSON = {"id": "1", "type": "function", "function": {"name": "search", "arguments": "{}"}}
CHAT: dict[str, JSON] = {
    "tools": TOOLS,
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": [{"type": "text", "text": "a page"}]},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}, {"type": "image_url"}]},
    ],
}
RESPONSES: dict[str, JSON] = {
    "tools": TOOLS,
    "instructions": "Be brief.",
    "input": [
        {"role": "user", "content": "Hello"},
        {"type": "function_call", "id": "f", "call_id": "1", "name": "search", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "a page"},
        {"type": "file_search_call", "results": [{"text": "a file"}]},
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "And this?"}, {"type": "input_image"}],
        },
    ],
}


def parts(endpoint: str, request: Mapping[str, JSON]) -> dict[str, JSON]:
    return request_parts(Exchange(endpoint, request, (), context={"order": "7"}), list(ContextPart))


def test_a_chat_is_taken_apart() -> None:
    assert parts("chat", CHAT) == {
        "system": "Be brief.",
        "history": [
            {"role": "user", "said": "Hello"},
            {"role": "assistant", "said": {"text": None, "tool_calls": [CALL]}},
        ],
        "question": "And this?\n[image_url]",
        "tool_results": ["a page"],
        "tools": TOOLS,
        "metadata": {"order": "7"},
    }


def test_a_responses_request_is_taken_apart() -> None:
    found = parts("responses", RESPONSES)
    assert found["system"] == "Be brief."
    assert found["question"] == "And this?\n[input_image]"
    assert found["tool_results"] == ["a page", "a file"]
    call = {"type": "function_call", "call_id": "1", "name": "search", "arguments": "{}"}
    assert found["history"] == [
        {"role": "user", "said": "Hello"},
        {"role": "assistant", "said": call},
    ]
    assert parts("responses", {"input": "Hi"})["question"] == "Hi"


def test_a_completion_is_its_prompt() -> None:
    assert parts("completions", {"prompt": "Once"}) == {
        "question": "Once",
        "metadata": {"order": "7"},
    }


def test_only_the_parts_asked_for_are_shown() -> None:
    assert request_parts(Exchange("chat", CHAT, ()), [ContextPart.SYSTEM]) == {
        "system": "Be brief."
    }


@pytest.mark.parametrize(
    "request_body",
    [
        {},
        {"messages": None},
        {"messages": "x"},
        {"messages": [1, None, {}, {"role": 5, "content": {"a": 1}}]},
        {"messages": [{"role": "user", "content": [None, 3, {"type": 4}]}]},
    ],
)
def test_a_request_of_any_shape_is_taken_apart(request_body: dict[str, JSON]) -> None:
    for endpoint in ("chat", "responses", "completions"):
        assert "system" not in parts(endpoint, request_body)


def test_the_candidate_is_its_text_refusal_and_tool_calls() -> None:
    called = answered("Done.", calls=[("refund", '{"amount": 5}')]).choices[0]
    assert answer_parts(called) == {
        "text": "Done.",
        "tool_calls": [{"name": "refund", "arguments": '{"amount": 5}'}],
    }
    refused = Choice("choices[0]", refusals=(Passage("choices[0].message.refusal", "No."),))
    assert answer_parts(refused) == {"text": "", "refusal": "No."}
