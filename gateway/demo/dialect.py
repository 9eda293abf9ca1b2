"""The three dialects: chat completions, legacy completions, responses; whole and as events.

References
----------
OpenAI API document: `CreateChatCompletionResponse`, `CreateChatCompletionStreamResponse`,
`CreateCompletionResponse`, `Response`, `ResponseStreamEvent`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from gateway.demo.speech import Ask, Call, Object, Said, Step


def _interleaved(spoken: Sequence[Said]) -> Iterator[tuple[Said, Step]]:
    for row in itertools.zip_longest(*(choice.steps for choice in spoken)):
        for choice, step in zip(spoken, row, strict=True):
            if step is not None:
                yield choice, step


def _usage_field(ask: Ask, spoken: Sequence[Said]) -> Object:
    prompt, answer, reasoning = ask.usage(spoken)
    details = {"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0, "audio_tokens": 0}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": reasoning, **details},
        **ask.script.usage,
    }


def _wants_usage(ask: Ask) -> bool:
    options = ask.request.get("stream_options")
    return isinstance(options, dict) and bool(options.get("include_usage"))


def _count(ask: Ask) -> int:
    wanted = ask.request.get("n")
    return wanted if isinstance(wanted, int) else 1


# --------------------------------------------------------------------------------------------- chat


def _chat_said(ask: Ask) -> list[Said]:
    top = ask.request.get("top_logprobs")
    wanted = bool(ask.request.get("logprobs"))
    return ask.say(_count(ask), logprobs=wanted, top=top if isinstance(top, int) else 0)


def _chat_logprobs(entries: list[Object] | None, *, refused: bool) -> Object | None:
    if not entries:
        return None
    return {"content": None if refused else entries, "refusal": entries if refused else None}


def _chat_envelope(ask: Ask, kind: str) -> Object:
    return {
        "id": f"chatcmpl-{ask.suffix}",
        "object": kind,
        "created": ask.created,
        "model": ask.model,
        "service_tier": "default",
        "system_fingerprint": "fp_demo000001",
    }


def chat_body(ask: Ask) -> Object:
    """A chat completion."""
    spoken = _chat_said(ask)
    extra = ask.script.extra
    choices = []
    for said in spoken:
        message: Object = {
            "role": "assistant",
            "content": said.content,
            "refusal": said.refusal,
            "annotations": [],
        }
        if said.reasoning is not None:
            message["reasoning_content"] = said.reasoning
        if said.calls:
            message["tool_calls"] = [_chat_call(call, call.arguments) for call in said.calls]
        logprobs = _chat_logprobs(said.logprobs, refused=said.refusal is not None)
        choices.append(
            {"index": said.index, "message": message | extra.message}
            | ask.logprobs_field(logprobs)
            | {"finish_reason": said.finish_reason}
            | extra.choice
        )
    envelope = _chat_envelope(ask, "chat.completion")
    return envelope | {"choices": choices, "usage": _usage_field(ask, spoken)} | extra.body


def _chat_call(call: Call, arguments: str) -> Object:
    function = {"name": call.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def chat_events(ask: Ask) -> Iterator[Object]:
    """The chunks of a streamed chat completion: roles, deltas, finish reasons, any usage."""
    spoken = _chat_said(ask)
    for said in spoken:
        content = "" if said.content is not None else None
        role = {"role": "assistant", "content": content, "refusal": None} | ask.script.extra.message
        yield _chat_chunk(ask, [_chat_choice(ask, said, role)])
    started: set[tuple[int, int]] = set()
    for said, step in _interleaved(spoken):
        if step.kind == "call" and (said.index, step.call) not in started:
            started.add((said.index, step.call))
            opening = {"index": step.call} | _chat_call(said.calls[step.call], "")
            yield _chat_chunk(ask, [_chat_choice(ask, said, {"tool_calls": [opening]})])
        logprobs = _chat_logprobs(step.entries, refused=step.kind == "refusal")
        yield _chat_chunk(ask, [_chat_choice(ask, said, _chat_delta(step), logprobs)])
    for said in spoken:
        yield _chat_chunk(ask, [_chat_choice(ask, said, {}, finish=said.finish_reason)])
    if _wants_usage(ask):
        yield _chat_chunk(ask, [], _usage_field(ask, spoken))


def _chat_chunk(ask: Ask, choices: list[Object], usage: Object | None = None) -> Object:
    chunk = _chat_envelope(ask, "chat.completion.chunk") | {"choices": choices}
    return chunk | ({"usage": usage} if _wants_usage(ask) else {}) | ask.script.extra.body


def _chat_choice(
    ask: Ask, said: Said, delta: Object, logprobs: Object | None = None, finish: str | None = None
) -> Object:
    choice = {"index": said.index, "delta": delta} | ask.logprobs_field(logprobs)
    return choice | {"finish_reason": finish} | ask.script.extra.choice


def _chat_delta(step: Step) -> Object:
    if step.kind == "call":
        return {"tool_calls": [{"index": step.call, "function": {"arguments": step.delta}}]}
    names = {"text": "content", "refusal": "refusal", "reasoning": "reasoning_content"}
    return {names[step.kind]: step.delta}


# -------------------------------------------------------------------------------------- completions


def _completion_said(ask: Ask) -> list[Said]:
    prompts = ask.request.get("prompt")
    count = _count(ask) * (len(prompts) if isinstance(prompts, list) else 1)
    top = ask.request.get("logprobs")
    return ask.say(count, logprobs=top is not None, top=top if isinstance(top, int) else 0)


def _legacy_logprobs(entries: Sequence[Object] | None, offset: int = 0) -> Object | None:
    if not entries:
        return None
    tokens = [str(entry.get("token", "")) for entry in entries]
    offsets = itertools.accumulate(map(len, tokens[:-1]), initial=offset)
    tops = [
        {top["token"]: top["logprob"] for top in entry.get("top_logprobs") or ()} or None
        for entry in entries
    ]
    return {
        "tokens": tokens,
        "token_logprobs": [entry.get("logprob") for entry in entries],
        "top_logprobs": tops,
        "text_offset": list(offsets),
    }


def _completion(ask: Ask, choices: list[Object], usage: Object | None) -> Object:
    envelope = {
        "id": f"cmpl-{ask.suffix}",
        "object": "text_completion",
        "created": ask.created,
        "model": ask.model,
        "choices": choices,
    }
    return envelope | ({"usage": usage} if usage else {}) | ask.script.extra.body


def _completion_choice(
    ask: Ask, said: Said, text: object, logprobs: Object | None, finish: str | None
) -> Object:
    choice = {"text": text, "index": said.index} | ask.logprobs_field(logprobs)
    return choice | {"finish_reason": finish} | ask.script.extra.choice


def completion_body(ask: Ask) -> Object:
    """A legacy completion; refusals, reasoning and tool calls have no place in it."""
    spoken = _completion_said(ask)
    choices = [
        _completion_choice(ask, s, s.content or "", _legacy_logprobs(s.logprobs), s.finish_reason)
        for s in spoken
    ]
    return _completion(ask, choices, _usage_field(ask, spoken))


def completion_events(ask: Ask) -> Iterator[Object]:
    """The events of a streamed legacy completion, each of the shape of the whole."""
    spoken = _completion_said(ask)
    offsets = [0] * len(spoken)
    for said, step in _interleaved(spoken):
        if step.kind == "text":
            logprobs = _legacy_logprobs(step.entries, offsets[said.index])
            offsets[said.index] += sum(len(str(e.get("token", ""))) for e in step.entries)
            choice = _completion_choice(ask, said, step.delta, logprobs, None)
            yield _completion(ask, [choice], None)
    for said in spoken:
        choice = _completion_choice(ask, said, "", None, said.finish_reason)
        yield _completion(ask, [choice], None)
    if _wants_usage(ask):
        yield _completion(ask, [], _usage_field(ask, spoken))


# ---------------------------------------------------------------------------------------- responses


def _response_said(ask: Ask) -> Said:
    include = ask.request.get("include")
    wanted = isinstance(include, list) and "message.output_text.logprobs" in include
    top = ask.request.get("top_logprobs")
    return ask.say(1, logprobs=wanted, top=top if isinstance(top, int) else 0)[0]


def _response(ask: Ask, said: Said, output: list[Object], *, done: bool) -> Object:
    request = ask.request
    reason = {"length": "max_output_tokens", "content_filter": "content_filter"}.get(
        said.finish_reason
    )
    status = ("incomplete" if reason else "completed") if done else "in_progress"
    prompt, answer, reasoning = ask.usage([said])
    usage = {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": answer,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + answer,
        **ask.script.usage,
    }
    defaults: Object = {
        "background": False,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
    }
    return {
        "id": f"resp_{ask.suffix}",
        "object": "response",
        "created_at": ask.created,
        "status": status,
        "completed_at": ask.created if status == "completed" else None,
        "error": None,
        "incomplete_details": {"reason": reason} if done and reason else None,
        "model": ask.model,
        "output": output,
        "service_tier": "default",
        "usage": usage if done else None,
        **{name: request.get(name, value) for name, value in defaults.items()},
        **ask.script.extra.body,
    }


def response_body(ask: Ask) -> Object:
    """A response of the Responses API, finished."""
    *_, last = response_events(ask)
    response: Object = last["response"]
    return response


def response_events(ask: Ask) -> Iterator[Object]:
    """The typed events of a streamed response, numbered by `sequence_number` from 0."""
    for number, (kind, event) in enumerate(_response_events(ask)):
        yield {"type": f"response.{kind}", "sequence_number": number, **event}


def _response_events(ask: Ask) -> Iterator[tuple[str, Object]]:
    said = _response_said(ask)
    for kind in ("created", "in_progress"):
        yield kind, {"response": _response(ask, said, [], done=False)}
    output: list[Object] = []
    for kind, call, steps in _items(said):
        place = {"output_index": len(output)}
        item = {"id": f"{_ITEM_ID[kind]}_{ask.suffix}{len(output)}"}
        yield from _ITEM_EVENTS[kind](ask, said, item, place, steps, call)
        output.append(item)
    final = _response(ask, said, output, done=True)
    yield final["status"], {"response": final}


def _items(said: Said) -> Iterator[tuple[str, int, list[Step]]]:
    for (kind, call), steps in itertools.groupby(said.steps, lambda step: (step.kind, step.call)):
        yield kind, call, list(steps)


def _item(ask: Ask, item: Object, place: Object, fields: Object, *, done: bool) -> Object:
    """Fill `item` in and give the event that announces it."""
    item |= fields | ask.script.extra.choice
    if item["type"] != "reasoning":
        item["status"] = "completed" if done else "in_progress"
    return place | {"item": dict(item)}


def _message_events(
    ask: Ask, said: Said, item: Object, place: Object, steps: list[Step], _: int
) -> Iterator[tuple[str, Object]]:
    refused = steps[0].kind == "refusal"
    kind, name = ("refusal", "refusal") if refused else ("output_text", "text")
    at = {"item_id": item["id"], **place, "content_index": 0}

    def part(text: Any, entries: list[Object]) -> Object:
        said_part = {"type": kind, name: text}
        if not refused:
            said_part |= {"annotations": []} | ask.logprobs_field(entries)
        return said_part | ask.script.extra.message

    def spoken(entries: list[Object]) -> Object:
        return {} if refused else ask.logprobs_field([_without_bytes(entry) for entry in entries])

    fields = {"type": "message", "role": "assistant", "content": []}
    yield "output_item.added", _item(ask, item, place, fields, done=False)
    yield "content_part.added", at | {"part": part("", [])}
    for step in steps:
        yield f"{kind}.delta", at | {"delta": step.delta} | spoken(step.entries)
    text = said.refusal if refused else said.content
    entries = [entry for step in steps for entry in step.entries]
    yield f"{kind}.done", at | {name: text} | spoken(entries)
    yield "content_part.done", at | {"part": part(text, entries)}
    yield "output_item.done", _item(ask, item, place, {"content": [part(text, entries)]}, done=True)


def _without_bytes(entry: Object) -> Object:
    tops = [
        {k: v for k, v in top.items() if k != "bytes"} for top in entry.get("top_logprobs") or ()
    ]
    return {k: v for k, v in entry.items() if k != "bytes"} | {"top_logprobs": tops}


def _call_events(
    ask: Ask, said: Said, item: Object, place: Object, steps: list[Step], number: int
) -> Iterator[tuple[str, Object]]:
    call = said.calls[number]
    at = {"item_id": item["id"], **place}
    fields = {"type": "function_call", "call_id": call.id, "name": call.name, "arguments": ""}
    yield "output_item.added", _item(ask, item, place, fields, done=False)
    for step in steps:
        yield "function_call_arguments.delta", at | {"delta": step.delta}
    done = {"arguments": call.arguments}
    yield "function_call_arguments.done", at | {"name": call.name} | done
    yield "output_item.done", _item(ask, item, place, done, done=True)


def _reasoning_events(
    ask: Ask, said: Said, item: Object, place: Object, steps: list[Step], _: int
) -> Iterator[tuple[str, Object]]:
    at = {"item_id": item["id"], **place, "summary_index": 0}
    part = {"type": "summary_text", "text": said.reasoning}
    fields = {"type": "reasoning", "summary": []}
    yield "output_item.added", _item(ask, item, place, fields, done=False)
    yield "reasoning_summary_part.added", at | {"part": part | {"text": ""}}
    for step in steps:
        yield "reasoning_summary_text.delta", at | {"delta": step.delta}
    yield "reasoning_summary_text.done", at | {"text": said.reasoning}
    yield "reasoning_summary_part.done", at | {"part": part}
    yield "output_item.done", _item(ask, item, place, {"summary": [part]}, done=True)


_ITEM_ID = {"reasoning": "rs", "text": "msg", "refusal": "msg", "call": "fc"}
_ITEM_EVENTS = {
    "reasoning": _reasoning_events,
    "text": _message_events,
    "refusal": _message_events,
    "call": _call_events,
}
