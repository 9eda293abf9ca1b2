"""Exchanges for tests: from the language-neutral form of the vectors, or of one text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import TypeAdapter

from validators import (
    AnyValidator,
    CheckResult,
    Choice,
    Exchange,
    Passage,
    Scan,
    ToolCall,
    Validator,
)

_CHECK: TypeAdapter[Validator] = TypeAdapter(AnyValidator)


def check_of(use: str, *, read: Callable[[str], str] | None = None, **config: Any) -> Validator:
    """The check a policy would have, from its YAML keys."""
    context = {} if read is None else {"read": read}
    return _CHECK.validate_python({"use": use, "id": "check", **config}, context=context)


def scan_of(use: str, **config: Any) -> Scan:
    """A check that searches text."""
    check = check_of(use, **config)
    assert isinstance(check, Scan)
    return check


def joined(text: str | list[str]) -> str:
    """A text, which vectors may give in parts so that no made-up credential stands in the repository whole."""
    return text if isinstance(text, str) else "".join(text)


def exchange_of(data: Mapping[str, Any]) -> Exchange:
    """The exchange a vector describes, with the paths of chat completions."""
    return Exchange(
        endpoint=data.get("endpoint", "chat"),
        request=data.get("request", {}),
        choices=tuple(_choice(number, choice) for number, choice in enumerate(data["choices"])),
    )


def said(text: str, finish_reason: str | None = "stop") -> Exchange:
    """An exchange whose one choice is `text`."""
    return exchange_of({"choices": [{"text": text, "finish_reason": finish_reason}]})


def called(arguments: str, name: str = "tool") -> Exchange:
    """An exchange whose one choice calls one tool."""
    return exchange_of({"choices": [{"tool_calls": [{"name": name, "arguments": arguments}]}]})


def covered(exchange: Exchange, result: CheckResult) -> list[str]:
    """The text under the span of each finding."""
    texts = {
        passage.path: passage.text
        for choice in exchange.choices
        for passage in (
            *choice.texts,
            *choice.refusals,
            *choice.reasonings,
            *(call.arguments for call in choice.tool_calls),
        )
    }
    return [
        texts[finding.path.partition("#")[0]][slice(*finding.span)]
        for finding in result.findings
        if finding.span is not None
    ]


def _choice(number: int, data: Mapping[str, Any]) -> Choice:
    path = f"choices[{number}]"
    texts = [data["text"]] if "text" in data else data.get("texts", [])
    names = [f"{path}.message.content"]
    if len(texts) > 1:
        names = [f"{path}.message.content[{part}].text" for part in range(len(texts))]
    calls = data.get("tool_calls", [])
    return Choice(
        path,
        texts=tuple(Passage(name, joined(text)) for name, text in zip(names, texts, strict=False)),
        refusals=_single(f"{path}.message.refusal", data.get("refusal")),
        reasonings=_single(f"{path}.message.reasoning_content", data.get("reasoning")),
        tool_calls=tuple(
            ToolCall(
                call["name"],
                Passage(
                    f"{path}.message.tool_calls[{place}].function.arguments",
                    joined(call["arguments"]),
                ),
            )
            for place, call in enumerate(calls)
        ),
        finish_reason=data.get("finish_reason"),
    )


def _single(path: str, text: str | None) -> tuple[Passage, ...]:
    return () if text is None else (Passage(path, text),)
