"""Random responses of the checked endpoints, as a provider may send them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from gateway.wire import CHAT, COMPLETIONS, RESPONSES, Reading, passages_of

__all__ = ["CHAT", "COMPLETIONS", "RESPONSES", "bodies", "said"]

Body = dict[str, Any]

texts = st.text(max_size=12)
names = st.sampled_from(["f", "lookup", "pay"])
finish_reasons = st.sampled_from(["stop", "length", "tool_calls", "content_filter"])
unknown = st.dictionaries(
    st.sampled_from(["x_trace", "citations", "provider"]),
    st.recursive(
        st.none() | st.booleans() | st.integers(-9, 9) | texts,
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
        max_leaves=4,
    ),
    max_size=2,
)
tops = st.fixed_dictionaries(
    {
        "token": texts,
        "logprob": st.floats(-30, 0),
        "bytes": st.lists(st.integers(0, 255), max_size=2),
    }
)
token = st.fixed_dictionaries(
    {
        "token": texts,
        "logprob": st.floats(-30, 0),
        "bytes": st.lists(st.integers(0, 255), max_size=2),
        "top_logprobs": st.lists(tops, max_size=2),
    }
)
usage = st.fixed_dictionaries(
    {
        "prompt_tokens": st.integers(0, 99),
        "completion_tokens": st.integers(0, 99),
        "total_tokens": st.integers(0, 99),
    }
)


def bodies(endpoint: str, *, official: bool = False) -> st.SearchStrategy[Body]:
    """Bodies of an endpoint; `official` ones hold only what the API document knows."""
    made = {CHAT: _chat, COMPLETIONS: _completion, RESPONSES: _response}[endpoint](official)
    return made if official else st.builds(lambda body, more: {**more, **body}, made, unknown)


def said(reading: Reading) -> list[Any]:
    """What a response says, however it is written: an empty text says nothing."""
    return [
        (
            [(p.path, p.text) for p in passages_of(choice) if p.text],
            [call.name for call in choice.tool_calls],
            choice.finish_reason,
            [(t.token, t.logprob, t.top_logprobs) for t in choice.logprobs or ()],
        )
        for choice in reading.choices
    ]


def _chat(official: bool) -> st.SearchStrategy[Body]:
    function = st.fixed_dictionaries({"name": names, "arguments": texts})
    custom = st.fixed_dictionaries({"name": names, "input": texts})
    call = st.fixed_dictionaries({"id": texts, "type": st.just("function"), "function": function})
    other_call = st.fixed_dictionaries({"id": texts, "type": st.just("custom"), "custom": custom})
    part = st.fixed_dictionaries({"type": st.just("text"), "text": texts}) | st.fixed_dictionaries(
        {"type": st.just("refusal"), "refusal": texts}
    )
    message = st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": st.none() | texts},
        optional={
            "refusal": st.none() | texts,
            "tool_calls": st.lists(call, min_size=1, max_size=3),
            "function_call": st.none() | function,
            "annotations": st.just([]),
        },
    )
    if not official:
        more = st.fixed_dictionaries(
            {},
            optional={
                "content": st.lists(part, min_size=1, max_size=3),
                "reasoning_content": texts,
                "reasoning": st.none() | texts,
                "tool_calls": st.lists(call | other_call, min_size=1, max_size=3),
            },
        )
        message = st.builds(lambda a, b, c: {**c, **a, **b}, message, more, unknown)
    logprobs = st.fixed_dictionaries(
        {"content": st.none() | st.lists(token, max_size=3), "refusal": st.none()}
    )
    choice = st.fixed_dictionaries(
        {
            "message": message,
            "logprobs": st.none() | logprobs,
            "finish_reason": finish_reasons,
        }
    )
    return _completed(choice, "chat.completion")


def _completion(official: bool) -> st.SearchStrategy[Body]:
    logprobs = st.lists(st.tuples(texts, st.floats(-30, 0)), max_size=3).map(
        lambda tokens: {
            "tokens": [token for token, _ in tokens],
            "token_logprobs": [logprob for _, logprob in tokens],
            "top_logprobs": [{token: logprob} for token, logprob in tokens],
            "text_offset": list(range(len(tokens))),
        }
    )
    choice = st.fixed_dictionaries(
        {
            "text": texts,
            "logprobs": st.none() | logprobs,
            "finish_reason": st.sampled_from(["stop", "length"]),
        }
    )
    if not official:
        choice = st.builds(lambda a, b: {**b, **a}, choice, unknown)
    return _completed(choice, "text_completion")


def _completed(choice: st.SearchStrategy[Body], kind: str) -> st.SearchStrategy[Body]:
    return st.fixed_dictionaries(
        {
            "id": st.just("chatcmpl-1"),
            "object": st.just(kind),
            "created": st.just(1),
            "model": st.just("m-1"),
            "choices": st.lists(choice, min_size=1, max_size=3).map(
                lambda choices: [{"index": n, **each} for n, each in enumerate(choices)]
            ),
            "usage": usage,
        }
    )


def _response(official: bool) -> st.SearchStrategy[Body]:
    part = st.fixed_dictionaries(
        {
            "type": st.just("output_text"),
            "text": texts,
            "annotations": st.just([]),
            "logprobs": st.lists(token, max_size=2),
        }
    ) | st.fixed_dictionaries({"type": st.just("refusal"), "refusal": texts})
    common = {"id": st.just("item_1"), "status": st.just("completed")}
    message = st.fixed_dictionaries(
        {**common, "type": st.just("message"), "role": st.just("assistant"),
         "content": st.lists(part, max_size=2)}
    )  # fmt: skip
    call = st.fixed_dictionaries(
        {**common, "type": st.just("function_call"), "call_id": st.just("call_1"), "name": names,
         "arguments": texts}
    )  # fmt: skip
    custom = st.fixed_dictionaries(
        {**common, "type": st.just("custom_tool_call"), "call_id": st.just("call_1"), "name": names,
         "input": texts}
    )  # fmt: skip
    summary = st.fixed_dictionaries({"type": st.just("summary_text"), "text": texts})
    reasoning = st.fixed_dictionaries(
        {**common, "type": st.just("reasoning"), "summary": st.lists(summary, max_size=2)}
    )
    item = message | call | custom | reasoning
    if not official:
        odd = st.fixed_dictionaries({"type": st.just("message"), "content": texts})
        item = st.builds(lambda a, b: {**b, **a}, item | odd, unknown)
    return st.fixed_dictionaries(
        {
            "id": st.just("resp_1"),
            "object": st.just("response"),
            "created_at": st.just(1),
            "model": st.just("m-1"),
            "status": st.sampled_from(["completed", "incomplete"]),
            "output": st.lists(item, max_size=3),
            "parallel_tool_calls": st.just(True),
            "tool_choice": st.just("auto"),
            "tools": st.just([]),
        }
    )
