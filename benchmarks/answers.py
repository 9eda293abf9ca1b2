"""What the benchmark's upstream says: a 30-field invoice of about 300 tokens, made up here, and the schema it fits."""

from __future__ import annotations

import json
import random
from typing import Any

_TEXT = [
    "invoice_number",
    "currency",
    "supplier",
    "supplier_address",
    "customer",
    "customer_address",
]
_TEXT += [
    "payment_terms",
    "iban_country",
    "bank",
    "purchase_order",
    "contact",
    "language",
    "status",
    "notes",
]
_NUMBERS = ["net", "tax", "gross", "discount", "shipping", "paid", "open", "tax_rate"]
_DATES = ["issued", "due", "delivered"]
_FLAGS = ["reverse_charge", "reminder", "disputed", "recurring"]


def schema() -> dict[str, Any]:
    """A JSON Schema of 30 fields, one of them a list of items."""
    item = {
        "type": "object",
        "required": ["name", "quantity", "price"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 80},
            "quantity": {"type": "integer", "minimum": 1},
            "price": {"type": "number", "minimum": 0},
        },
    }
    properties: dict[str, Any] = {
        name: {"type": "string", "minLength": 1, "maxLength": 200} for name in _TEXT
    }
    properties |= {name: {"type": "number", "minimum": 0} for name in _NUMBERS}
    properties |= {
        name: {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"} for name in _DATES
    }
    properties |= {name: {"type": "boolean"} for name in _FLAGS}
    properties["items"] = {"type": "array", "minItems": 1, "maxItems": 50, "items": item}
    return {
        "type": "object",
        "required": sorted(properties),
        "additionalProperties": False,
        "properties": properties,
    }


def answer() -> str:
    """A valid answer of about 1.2 KB."""
    document: dict[str, Any] = {name: f"{name.replace('_', ' ')} of the sample" for name in _TEXT}
    document |= {name: round(17.5 * (n + 1), 2) for n, name in enumerate(_NUMBERS)}
    document |= dict.fromkeys(_DATES, "2026-11-20")
    document |= dict.fromkeys(_FLAGS, False)
    document["items"] = [
        {"name": f"article {n}", "quantity": n + 1, "price": 4.75} for n in range(5)
    ]
    return json.dumps(document)


def patterns() -> dict[str, str]:
    """Twenty patterns of the kinds policies have; none occurs in the answer."""
    words = [
        "guarantee",
        "lawsuit",
        "password",
        "confidential",
        "kill",
        "bomb",
        "hack",
        "exploit",
        "ransom",
        "refund_now",
    ]
    found = {f"word_{word}": rf"(?i)\b{word}s?\b" for word in words}
    return found | {
        "system_prompt": r"(?i)\bsystem prompt\b",
        "as_a_model": r"(?i)\bas an? (?:ai|language model)\b",
        "ignore": r"(?i)ignore (?:all )?previous instructions",
        "script": r"(?i)<script[^>]{0,80}>",
        "shell": r"\brm -rf /",
        "private_key": r"-----BEGIN [A-Z ]{1,20}PRIVATE KEY-----",
        "aws": r"\bAKIA[0-9A-Z]{16}\b",
        "ssn": r"\b\d{3}-\d{2}-\d{4}\b",
        "ip": r"\b(?:\d{1,3}\.){3}\d{1,3}\b",
        "drop": r"(?i)\bdrop table\b",
    }


def tokens() -> list[str]:
    """The answer cut into tokens of about four characters."""
    text = answer()
    return [text[start : start + 4] for start in range(0, len(text), 4)]


def logprobs(pieces: list[str]) -> list[dict[str, Any]]:
    """Log-probabilities with five alternatives per token, as the OpenAI API writes them."""
    chance = random.Random(7)
    content = []
    for piece in pieces:
        best = -chance.expovariate(12)
        rest = sorted((best - chance.expovariate(0.3) for _ in range(4)), reverse=True)
        tops = [(piece, best), *((f"{piece[:2]}{n}", value) for n, value in enumerate(rest))]
        entries = [{"token": t, "logprob": round(p, 9), "bytes": list(t.encode())} for t, p in tops]
        content.append({**entries[0], "top_logprobs": entries})
    return content


def completion(*, with_logprobs: bool) -> bytes:
    """A chat completion; with logprobs about 125 KB."""
    spoken = {"content": logprobs(tokens()), "refusal": None} if with_logprobs else None
    message = {"role": "assistant", "content": answer(), "refusal": None, "annotations": []}
    choice = {"index": 0, "message": message, "logprobs": spoken, "finish_reason": "stop"}
    usage = {"prompt_tokens": 400, "completion_tokens": 300, "total_tokens": 700}
    body = {"id": "chatcmpl-bench", "object": "chat.completion", "created": 1, "model": "bench"}
    return json.dumps({**body, "choices": [choice], "usage": usage}).encode()


def chunks() -> list[bytes]:
    """The same answer as the events of a stream, one a token."""
    head = {
        "id": "chatcmpl-bench",
        "object": "chat.completion.chunk",
        "created": 1,
        "model": "bench",
    }

    def event(delta: dict[str, Any], finish: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return b"data: " + json.dumps({**head, "choices": [choice]}).encode() + b"\n\n"

    spoken = [event({"content": piece}) for piece in tokens()]
    return [
        event({"role": "assistant", "content": ""}),
        *spoken,
        event({}, "stop"),
        b"data: [DONE]\n\n",
    ]


def request(model: str, *, stream: bool = False, with_logprobs: bool = False) -> bytes:
    """A chat request of about 2 KB."""
    system = (
        "You extract invoices into JSON and answer with one JSON object that fits the schema. " * 18
    )
    body: dict[str, Any] = {"model": model, "messages": [{"role": "system", "content": system}]}
    body["messages"].append(
        {"role": "user", "content": "Invoice 2026-1107 of the sample supplier, five articles."}
    )
    body |= {"stream": True} if stream else {}
    body |= {"logprobs": True, "top_logprobs": 5} if with_logprobs else {}
    return json.dumps(body).encode()


def verdict(nonce: str) -> bytes:
    """What a judge replies: that the answer is right, with the probability of that word."""
    tokens = ['{"nonce":"' + nonce + '","ok":"', "yes", '","why":"It is what was asked for."}']
    entries = [
        {"token": token, "logprob": -0.01, "top_logprobs": [{"token": token, "logprob": -0.01}]}
        for token in tokens
    ]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(tokens)},
        "finish_reason": "stop",
        "logprobs": {"content": entries},
    }
    usage = {"prompt_tokens": 900, "completion_tokens": 40, "total_tokens": 940}
    return json.dumps(
        {"id": "v", "object": "chat.completion", "choices": [choice], "usage": usage}
    ).encode()
