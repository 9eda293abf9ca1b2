"""Streams: the same decision as without, and what each mode lets through when."""

from __future__ import annotations

import itertools
import json
import sqlite3
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.demo import SCENARIOS
from gateway.settings import PACKAGED_CONFIG
from tests.acceptance.acting import ENDPOINTS, PATHS, request, scripted
from tests.acceptance.conftest import FixedUpstream
from tests.acceptance.wire import events, said
from tests.conftest import GatewayFactory, UpstreamCalls
from tests.processes import Server

VECTORS = Path(__file__).parent.parent / "vectors"


def decision(holdgate: Server, answer: httpx.Response) -> dict[str, Any]:
    """The decision on an answer, as it is recorded."""
    shown = httpx.get(f"{holdgate.url}/decisions/{answer.headers['x-holdgate-decision']}")
    told: dict[str, Any] = shown.raise_for_status().json()
    return told


def corpus() -> list[dict[str, Any]]:
    """Scripts of all kinds of answers: the demo's, and what the checks' own examples say."""
    scripts = [s.script.attempt(0).model_dump(exclude_defaults=True) for s in SCENARIOS]
    for path in sorted(VECTORS.glob("*.json")):
        cases = json.loads(path.read_text("utf-8"))
        if path.stem not in ("forbid", "redact", "secrets", "pii", "tool_calls", "finish_reason"):
            continue
        scripts += filter(None, (_script(case["exchange"]) for case in cases))
    return scripts


def _script(exchange: dict[str, Any]) -> dict[str, Any] | None:
    """A script that says what the first choice of an example says, if it is small enough for a token stream."""
    choice = exchange["choices"][0] if exchange.get("choices") else {}
    script: dict[str, Any] = {}
    for name, key in (("text", "text"), ("refusal", "refusal"), ("reasoning", "reasoning")):
        if choice.get(name):
            script[key] = _spelt(choice[name])
    calls = choice.get("tool_calls") or ()
    script["tool_calls"] = [
        {"name": call["name"], "arguments": _spelt(call.get("arguments", "{}"))} for call in calls
    ]
    too_long = sum(len(str(value)) for value in script.values()) > 1500
    return None if too_long or not any(script.values()) else script


def _spelt(value: Any) -> Any:
    return "".join(value) if isinstance(value, list) else value
