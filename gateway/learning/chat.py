"""Conversations as fine-tuning takes them: from what was asked and answered at any endpoint to strictly checked chat messages.

References
----------
OpenAI API document: `ChatCompletionRequestMessage`, `FineTuneChatCompletionRequestAssistantMessage`, `ChatCompletionTool`; guide
"Supervised fine-tuning", section "Formatting your data": the last message is the assistant's, `weight` is 0 or 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gateway import wire
from validators import JSON

Message = dict[str, Any]


class NotChat(ValueError):
    """A conversation that cannot be written as chat messages."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Text(_Strict):
    type: Literal["text"]
    text: str


class _ImageUrl(_Strict):
    url: Annotated[str, Field(min_length=1)]
    detail: Literal["auto", "low", "high"] = "auto"


class _Image(_Strict):
    type: Literal["image_url"]
    image_url: _ImageUrl


_Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
_Texts = Annotated[list[_Text], Field(min_length=1)]
_UserPart = Annotated[_Text | _Image, Field(discriminator="type")]


class _System(_Strict):
    role: Literal["system"]
    content: str | _Texts
    name: str | None = None


class _User(_Strict):
    role: Literal["user"]
    content: str | Annotated[list[_UserPart], Field(min_length=1)]
    name: str | None = None


class _Called(_Strict):
    name: _Name
    arguments: str

    @model_validator(mode="after")
    def _is_json(self) -> _Called:
        orjson.loads(self.arguments)
        return self


class _ToolCall(_Strict):
    id: Annotated[str, Field(min_length=1)]
    type: Literal["function"]
    function: _Called


class _Assistant(_Strict):
    role: Literal["assistant"]
    content: str | _Texts | None = None
    tool_calls: Annotated[list[_ToolCall], Field(min_length=1)] | None = None
    name: str | None = None
    weight: Literal[0, 1] = 1

    @model_validator(mode="after")
    def _says_something(self) -> _Assistant:
        if not self.content and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class _Tool(_Strict):
    role: Literal["tool"]
    content: str | _Texts
    tool_call_id: str


class _Function(_Strict):
    name: _Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class _ToolDefinition(_Strict):
    type: Literal["function"]
    function: _Function


_AnyMessage = Annotated[_System | _User | _Assistant | _Tool, Field(discriminator="role")]


class Conversation(_Strict):
    """What one line teaches: it ends with what the assistant should say, and every call of a tool is answered."""

    messages: Annotated[list[_AnyMessage], Field(min_length=2)]
    tools: Annotated[list[_ToolDefinition], Field(min_length=1)] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _is_a_conversation(self) -> Conversation:
        called: set[str] = set()
        for message in self.messages:
            if isinstance(message, _Tool):
                if message.tool_call_id not in called:
                    raise ValueError(f"no call {message.tool_call_id!r} waits for a tool's answer")
                called.remove(message.tool_call_id)
            elif called:
                raise ValueError("a tool was called and did not answer")
            elif isinstance(message, _Assistant):
                called = {each.id for each in message.tool_calls or ()}
        last = self.messages[-1]
        if not isinstance(last, _Assistant) or last.weight != 1:
            raise ValueError("the last message is not one of the assistant to be learnt")
        return self


def conversation(endpoint: str, request: Mapping[str, JSON], answer: Message) -> dict[str, Any]:
    """The request and the answer as one checked conversation, as it is written; only the answer is to be learnt.

    Raises
    ------
    NotChat
        If it is not one that fine-tuning takes.
    """
    try:
        asked = [_known(each) for each in _asked(endpoint, request)]
        for each in asked:
            if each.get("role") == "assistant":
                each["weight"] = 0
        found: dict[str, Any] = {"messages": [*asked, {**answer, "weight": 1}]}
        if tools := _tools(request):
            found["tools"] = tools
            if isinstance(request.get("parallel_tool_calls"), bool):
                found["parallel_tool_calls"] = request["parallel_tool_calls"]
        Conversation.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise NotChat(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (AttributeError, KeyError, TypeError) as error:
        raise NotChat("it is not what the API document says") from error
    return found


def answer_of(endpoint: str, body: bytes) -> Message:
    """What a response says, as one message of the assistant.

    Raises
    ------
    NotChat
        If it has not exactly one choice, or says what no message can.
    """
    document = orjson.loads(body)
    try:
        if endpoint == wire.RESPONSES:
            messages = _from_items(document["output"])
        elif endpoint == wire.COMPLETIONS:
            messages = [{"role": "assistant", "content": c["text"]} for c in document["choices"]]
        else:
            messages = [_known(choice["message"]) for choice in document["choices"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise NotChat("it is not what the API document says") from error
    if len(messages) != 1 or messages[0].get("role") != "assistant":
        raise NotChat("it is not one message of the assistant")
    return messages[0]


_KEPT = ("role", "content", "name", "tool_call_id")


def _known(message: Mapping[str, Any]) -> Message:
    """The message with what fine-tuning knows of it; a refusal is what was said."""
    if message.get("audio") or message.get("function_call"):
        raise NotChat("it speaks, or calls functions in a way that is no longer taught")
    known = {name: message[name] for name in _KEPT if message.get(name) is not None}
    if known.get("role") == "developer":
        known["role"] = "system"
    if isinstance(content := known.get("content"), list):
        known["content"] = [_part(each) for each in content]
    if message.get("refusal") and not known.get("content"):
        known["content"] = message["refusal"]
    if calls := message.get("tool_calls"):
        known["tool_calls"] = [
            {"id": each["id"], "type": each["type"], "function": _called(each["function"])}
            for each in calls
        ]
    return known


def _called(function: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": function["name"], "arguments": function["arguments"]}


_TEXTS = {"text", "input_text", "output_text"}


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of a message's content; what is neither text nor image stays as it is, and is refused later."""
    if part["type"] in _TEXTS:
        return {"type": "text", "text": part["text"]}
    if part["type"] == "refusal":
        return {"type": "text", "text": part["refusal"]}
    if part["type"] == "input_image" and isinstance(part.get("image_url"), str):
        return {"type": "image_url", "image_url": {"url": part["image_url"]}}
    return dict(part)


def _asked(endpoint: str, request: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    if endpoint == wire.CHAT:
        return list(request["messages"])
    if endpoint == wire.COMPLETIONS:
        prompt = request["prompt"]
        return [{"role": "user", "content": prompt}]
    if request.get("previous_response_id") or request.get("conversation"):
        raise NotChat("it goes on from a conversation that the provider keeps")
    instructions = request.get("instructions")
    opening = [{"role": "system", "content": instructions}] if instructions else []
    given = request["input"]
    if isinstance(given, str):
        return [*opening, {"role": "user", "content": given}]
    return [*opening, *_from_items(given)]


def _from_items(items: Sequence[Mapping[str, Any]]) -> list[Message]:
    """The items of the Responses API as messages; calls that follow each other, or a text, are one message."""
    messages: list[Message] = []
    for item in items:
        match item.get("type", "message"):
            case "message":
                messages.append(_known({"role": item["role"], "content": item["content"]}))
            case "function_call":
                call = {"id": item["call_id"], "type": "function", "function": _called(item)}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                said = {"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]}
                messages.append(_known(said))
            case "reasoning":
                pass
            case other:
                raise NotChat(f"no message says what {str(other)[:40]} does")
    return messages


def _tools(request: Mapping[str, Any]) -> list[dict[str, Any]]:
    tools = []
    for tool in request.get("tools") or ():
        if tool.get("type") != "function":
            raise NotChat("it offers tools that are no functions")
        given = tool.get("function") or tool
        known = ("name", "description", "parameters", "strict")
        function = {name: given[name] for name in known if given.get(name) is not None}
        tools.append({"type": "function", "function": function})
    return tools
