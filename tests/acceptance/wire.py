"""How the tests read what a gateway sends."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import httpx

DONE = b"data: [DONE]\n\n"

#: A credential that no issuer gave out, cut in two so that no scanner takes this file for a leak.
SECRET = "AKIA" + "Q7ZK3M5XW2N6RTVB"


def events(body: bytes) -> list[dict[str, Any]]:
    """The data of every event of a stream, comments and `[DONE]` left out."""
    lines = [line[5:].strip() for line in body.splitlines() if line.startswith(b"data:")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


def said(endpoint: str, answer: httpx.Response) -> list[str]:
    """All that each choice says, whether it came whole or as a stream: text, refusal, tool arguments, reasoning."""
    if not answer.headers["content-type"].startswith("text/event-stream"):
        return _said_whole(endpoint, answer.json())
    if endpoint == "responses":
        return _said_whole(endpoint, events(answer.content)[-1]["response"])
    spoken: dict[int, str] = {}
    for choice in (c for chunk in events(answer.content) for c in chunk.get("choices", ())):
        text = _text(choice.get("delta", choice))
        spoken[choice["index"]] = spoken.get(choice["index"], "") + text
    return [spoken[index] for index in sorted(spoken)]


def _said_whole(endpoint: str, body: Mapping[str, Any]) -> list[str]:
    if endpoint == "responses":
        return ["".join(_item_text(item) for item in body["output"])]
    return [_text(choice.get("message", choice)) for choice in body["choices"]]


def _text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls") or ()
    parts = [message.get(name) for name in ("reasoning_content", "content", "text", "refusal")]
    parts += [call.get("function", {}).get("arguments") for call in calls]
    return "".join(part for part in parts if part)


def _item_text(item: Mapping[str, Any]) -> str:
    parts = [*(item.get("summary") or ()), *(item.get("content") or ())]
    spoken = [part.get("text", "") + part.get("refusal", "") for part in parts]
    return "".join(spoken) + str(item.get("arguments", ""))
