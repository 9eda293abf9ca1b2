"""What of an exchange a judge is shown: parts of the request, and the candidate answer, as plain JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from enum import StrEnum

from validators import JSON, Choice, Exchange


class ContextPart(StrEnum):
    """A part of the request."""

    SYSTEM = "system"
    """System and developer messages; the `instructions` of the Responses API."""
    HISTORY = "history"
    """What the user and the model said before the question, tool calls included."""
    QUESTION = "question"
    """The last user message; the `prompt` of completions."""
    TOOL_RESULTS = "tool_results"
    """What tools and searches gave."""
    TOOLS = "tools"
    """The tools that the model may call."""
    METADATA = "metadata"
    """What the application says of the case."""


def request_parts(exchange: Exchange, parts: Sequence[ContextPart]) -> dict[str, JSON]:
    """Those of `parts` that the request has, by name, as text or lists; what is not text is named, not shown."""
    found: dict[ContextPart, JSON] = {
        ContextPart.TOOLS: exchange.request.get("tools") or exchange.request.get("functions"),
        ContextPart.METADATA: dict(exchange.context),
    }
    system: list[JSON] = []
    results: list[JSON] = []
    turns: list[dict[str, JSON]] = []
    for role, said in _messages(exchange):
        match role:
            case "system" | "developer":
                system.append(said)
            case "tool" | "function":
                results.append(said)
            case _:
                turns.append({"role": role, "said": said})
    asked = [index for index, turn in enumerate(turns) if turn["role"] == "user"]
    if asked:
        found[ContextPart.QUESTION] = turns.pop(asked[-1])["said"]
    found[ContextPart.SYSTEM] = "\n\n".join(map(str, system))
    found[ContextPart.TOOL_RESULTS] = results
    found[ContextPart.HISTORY] = [*turns]
    return {part.value: value for part in parts if (value := found.get(part))}


def answer_parts(choice: Choice) -> dict[str, JSON]:
    """The candidate: its text, and its refusal and tool calls where there are any."""
    answer: dict[str, JSON] = {"text": choice.text}
    if choice.refusals:
        answer["refusal"] = "".join(passage.text for passage in choice.refusals)
    if choice.tool_calls:
        answer["tool_calls"] = [
            {"name": call.name, "arguments": call.arguments.text} for call in choice.tool_calls
        ]
    return answer


def _messages(exchange: Exchange) -> Iterator[tuple[str, JSON]]:
    """Each message of the request as (role, what it says), in order."""
    request = exchange.request
    if exchange.endpoint == "completions":
        yield "user", request.get("prompt")
        return
    if instructions := request.get("instructions"):
        yield "system", _said(instructions)
    messages = request.get("input" if exchange.endpoint == "responses" else "messages")
    if isinstance(messages, str):
        yield "user", messages
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            yield _message(message)


def _message(message: dict[str, JSON]) -> tuple[str, JSON]:
    role = message.get("role")
    if isinstance(role, str):
        said = _said(message.get("content"))
        calls = message.get("tool_calls") or message.get("function_call")
        return role, {"text": said, "tool_calls": calls} if calls else said
    # An item of the Responses API that is no message: a call, or what came of one.
    kind = str(message.get("type"))
    if kind.endswith("_output") or "results" in message:
        return "tool", _said(message.get("output") or message.get("results"))
    return "assistant", {
        key: value for key, value in message.items() if key not in ("id", "status")
    }


def _said(content: JSON) -> JSON:
    """The text of a message's content; of parts that are not text their kind in brackets."""
    if not isinstance(content, list):
        return content
    return "\n".join(_part(part) for part in content)


def _part(part: JSON) -> str:
    if not isinstance(part, dict):
        return str(part)
    text = part.get("text") or part.get("refusal")
    return text if isinstance(text, str) else f"[{part.get('type')}]"


def plain_messages(exchange: Exchange) -> list[dict[str, JSON]] | None:
    """The request as chat messages: a chat's own, those of a responses request if it is all text; None otherwise."""
    if exchange.endpoint == "chat":
        messages = exchange.request.get("messages")
        if not isinstance(messages, list):
            return None
        return [message for message in messages if isinstance(message, dict)]
    if exchange.endpoint != "responses" or exchange.request.get("tools"):
        return None
    plain: list[dict[str, JSON]] = [
        {"role": role, "content": said} for role, said in _messages(exchange)
    ]
    is_text = all(isinstance(each["content"], str) and each["role"] != "tool" for each in plain)
    return plain if plain and is_text else None
