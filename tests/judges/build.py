"""Judges, the exchanges they judge and the replies they get, for tests written as dialogues."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from judges import Alternative, AnyJudge, Dialogue, Judge, ModelCall, ModelReply, ReplyToken
from validators import JSON, CheckResult, Choice, Exchange, Passage, ToolCall

CONFIG = Path(__file__).parents[2] / "config"
NONCE = "0123456789abcdef"

CORRECT: dict[str, object] = {
    "name": "correct",
    "description": "Is it right?",
    "criteria": [{"id": "correct", "question": "Is the answer right?"}],
}
SUPPORTED: dict[str, object] = {
    "name": "supported",
    "description": "By the material alone.",
    "context": ["system", "question", "tool_results"],
    "criteria": [{"id": "supported", "question": "Does the material support the claim?"}],
}

_JUDGE: TypeAdapter[Judge] = TypeAdapter(AnyJudge)


def judge_of(use: str, *, files: Mapping[str, str] | None = None, **config: Any) -> Judge:
    """The judge a policy would have, from its YAML keys; `files` are what it may read."""
    context = {}
    if files is not None:

        def read(path: str) -> str:
            if path not in files:
                raise FileNotFoundError(2, "no such file")
            return files[path]

        context = {"read": read}
    if use in ("rubric", "grounded"):
        config = {"rubric": CORRECT if use == "rubric" else SUPPORTED, **config}
    if use not in ("panel", "escalating") and config.get("compare") != "normal_form":
        config = {"model": "judge-small", **config}
    given = {key: value for key, value in config.items() if value is not None}
    return _JUDGE.validate_python({"id": "check", "use": use, **given}, context=context)


def answered(
    *texts: str,
    question: str = "What is 6 times 7?",
    system: str = "Six times seven is 42.",
    request: Mapping[str, JSON] | None = None,
    context: Mapping[str, str] | None = None,
    calls: Sequence[tuple[str, str]] = (),
) -> Exchange:
    """A chat in which these are the choices, each with the tool calls (name, arguments)."""
    messages: list[JSON] = [
        {"role": "system", "content": system},
        {"role": "user", "content": question},
    ]
    choices = []
    for number, text in enumerate(texts):
        path = f"choices[{number}].message"
        tools = tuple(
            ToolCall(name, Passage(f"{path}.tool_calls[{place}].function.arguments", arguments))
            for place, (name, arguments) in enumerate(calls)
        )
        choices.append(
            Choice(f"choices[{number}]", (Passage(f"{path}.content", text),), tool_calls=tools)
        )
    body: Mapping[str, JSON] = request or {"model": "maker", "messages": messages}
    return Exchange("chat", body, tuple(choices), context=context or {})


def tokens(text: str, sure: float = 0.9, wrong: str = "no") -> list[ReplyToken]:
    """The text as tokens (words and single marks), each with probability `sure`, and the rest of it on `wrong`."""
    rest = [Alternative(wrong, log(1 - sure))] if sure < 1 else []
    return [
        ReplyToken(token, log(sure), [Alternative(token, log(sure)), *rest])
        for token in re.findall(r"\w+|\W", text)
    ]


def verdict(
    labels: Mapping[str, object],
    *,
    sure: float = 0.9,
    wrong: str = "no",
    nonce: str = NONCE,
    cost_usd: float = 0.0,
) -> ModelReply:
    """The reply a judge asks for, with logprobs."""
    text = json.dumps({"nonce": nonce, **labels, "why": "because"})
    return ModelReply(text, tokens(text, sure, wrong), "stop", cost_usd)


def begin(judge: Judge, exchange: Exchange) -> tuple[Dialogue, tuple[ModelCall, ...]]:
    """The dialogue and its first calls."""
    dialogue = judge.ask(exchange, NONCE)
    return dialogue, next(dialogue)


def ended(dialogue: Dialogue, *replies: ModelReply) -> CheckResult:
    """The result that these replies end the dialogue with."""
    try:
        calls = dialogue.send(replies) if replies else next(dialogue)
    except StopIteration as stop:
        result: CheckResult = stop.value
        return result
    raise AssertionError(f"the dialogue goes on with {len(calls)} calls")


def shown(call: ModelCall) -> dict[str, Any]:
    """The document between the fences of a call."""
    content = call.messages[-1]["content"]
    assert isinstance(content, str)
    document: dict[str, Any] = json.loads(content.splitlines()[2])
    return document


def fixed(call: ModelCall) -> str:
    """The part of the prompt before the last message."""
    (message,) = call.messages[:-1]
    assert isinstance(message["content"], str)
    return message["content"]
