"""The OpenAI wire: what a request asks, what a response says, and the logprobs that we add to one and take from the other.

Bodies are kept as the bytes that came. A response is read once into typed structs; what is taken out is spliced out.

References
----------
OpenAI API document: `CreateChatCompletionResponse`, `CreateCompletionResponse`, `Response`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import msgspec
import orjson
from msgspec.structs import replace

from policies.match import Facts
from validators import JSON, Choice, Passage, TokenLogprob, ToolCall, TopLogprob

CHAT, COMPLETIONS, RESPONSES = "chat", "completions", "responses"

#: Where each checked endpoint lives under /v1.
CHECKED_PATHS = {"/chat/completions": CHAT, "/completions": COMPLETIONS, "/responses": RESPONSES}
PATH_OF = {endpoint: path for path, endpoint in CHECKED_PATHS.items()}

NO_RAW = msgspec.Raw(b"null")

#: orjson writes no more than 254 levels.
_MAX_DEPTH = 200


class Unreadable(ValueError):
    """A body that is not what the API document says it is; the message says where."""


# ---------------------------------------------------------------------------------------------------------- requests


def parse_request(body: bytes) -> dict[str, JSON]:
    """The request body as a JSON object.

    Raises
    ------
    Unreadable
        If the body is not UTF-8, not JSON, nested too deeply, or not an object.
    """
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"The request body is not valid JSON: {error}.") from error
    if not isinstance(request, dict):
        raise Unreadable("The request body must be a JSON object.")
    if is_too_deep(body, request):
        raise Unreadable(f"The request body is nested more than {_MAX_DEPTH} levels deep.")
    return request


def is_too_deep(body: bytes, document: Any) -> bool:
    """Whether a document, which is what the body says, is nested deeper than we can take apart and write again."""
    if body.count(b"{") + body.count(b"[") <= _MAX_DEPTH:
        return False
    level = [document]
    for _ in range(_MAX_DEPTH):
        holders = (each.values() if isinstance(each, dict) else each for each in level)
        level = [value for each in holders for value in each if isinstance(value, dict | list)]
        if not level:
            return False
    return True


def facts(
    endpoint: str, request: Mapping[str, JSON], *, task: str | None, key: str | None
) -> Facts:
    """What policies match on. `task` (from the header) wins over the body's `metadata.task`.

    Raises
    ------
    Unreadable
        If `model` is not text, or `metadata` is not an object.
    """
    model = request.get("model") or ""
    if not isinstance(model, str):
        raise Unreadable("`model` must be a string.")
    metadata = request.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise Unreadable("`metadata` must be an object of strings.")
    context = {name: value for name, value in (metadata or {}).items() if isinstance(value, str)}
    return Facts(
        task=task or context.get("task"),
        model=model,
        endpoint=endpoint,
        tools=frozenset(_tool_names(request)),
        key=key,
        context=context,
    )


def _tool_names(request: Mapping[str, JSON]) -> Iterable[str]:
    for list_name in ("tools", "functions"):
        offered = request.get(list_name)
        for tool in offered if isinstance(offered, list) else ():
            if isinstance(tool, dict):
                inner = tool.get("function") or tool.get("custom") or tool
                name = inner.get("name") if isinstance(inner, dict) else None
                if isinstance(name, str):
                    yield name


def wants_logprobs(endpoint: str, request: Mapping[str, JSON]) -> bool:
    """True if the client itself asked for logprobs, so that they must reach it."""
    if endpoint == RESPONSES:
        include = request.get("include")
        return isinstance(include, list) and "message.output_text.logprobs" in include
    if endpoint == COMPLETIONS:
        return request.get("logprobs") is not None
    return bool(request.get("logprobs"))


def with_logprobs(endpoint: str, body: bytes, request: Mapping[str, JSON], top: int) -> bytes:
    """The request body, asking for logprobs with `top` alternatives.

    All other bytes are untouched unless the client wrote the same keys, in which case the object is written anew.
    """
    if endpoint == RESPONSES:
        include = request.get("include")
        asked = include if isinstance(include, list) else []
        added: dict[str, JSON] = {
            "include": [*asked, "message.output_text.logprobs"],
            "top_logprobs": top,
        }
    elif endpoint == COMPLETIONS:
        added = {"logprobs": top}
    else:
        added = {"logprobs": True, "top_logprobs": top}
    if any(name in request for name in added):
        return orjson.dumps({**request, **added})
    start = body.index(b"{") + 1
    separator = b"," if request else b""
    return body[:start] + orjson.dumps(added)[1:-1] + separator + body[start:]


# --------------------------------------------------------------------------------------------------------- responses


class _Part(msgspec.Struct, gc=False):
    type: str = ""
    text: str | None = None
    refusal: str | None = None
    transcript: str | None = None
    logprobs: msgspec.Raw = NO_RAW


class _Audio(msgspec.Struct, gc=False):
    transcript: str | None = None


class _Function(msgspec.Struct, gc=False):
    name: str | None = None
    arguments: str | None = None
    input: str | None = None


class _ToolCall(msgspec.Struct, gc=False):
    function: _Function | None = None
    custom: _Function | None = None


class Message(msgspec.Struct, gc=False):
    """What a choice of a chat completion says, or the next piece of it."""

    content: str | list[_Part] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None
    function_call: _Function | None = None
    audio: _Audio | None = None


class _Choice(msgspec.Struct, gc=False):
    message: Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: msgspec.Raw = NO_RAW


class _Completion(msgspec.Struct, gc=False):
    choices: list[_Choice]
    id: str = ""
    model: str = ""


class _Item(msgspec.Struct, gc=False):
    """An item of a response; what is raw may be a text or JSON."""

    type: str = ""
    name: str | None = None
    content: str | list[_Part] | None = None
    summary: list[_Part] | None = None
    arguments: msgspec.Raw = NO_RAW
    input: msgspec.Raw = NO_RAW
    action: msgspec.Raw = NO_RAW
    actions: msgspec.Raw = NO_RAW
    operation: msgspec.Raw = NO_RAW
    code: msgspec.Raw = NO_RAW
    queries: msgspec.Raw = NO_RAW
    output: msgspec.Raw = NO_RAW
    outputs: msgspec.Raw = NO_RAW
    results: msgspec.Raw = NO_RAW
    result: msgspec.Raw = NO_RAW
    error: msgspec.Raw = NO_RAW


#: What is said in a call that the client is to carry out, and in one that the provider has carried out.
_CALLED = ("arguments", "input")
_ACTED = ("action", "actions", "operation")
_HOSTED = ("code", "queries", "output", "outputs", "results", "result", "error")
_NOTHING = frozenset({b"{}", b"[]"})
_CLIENT_ACTS = frozenset({"computer_call", "local_shell_call", "shell_call", "apply_patch_call"})


class _Incomplete(msgspec.Struct, gc=False):
    reason: str | None = None


class _Response(msgspec.Struct, gc=False):
    output: list[_Item]
    id: str = ""
    model: str = ""
    status: str | None = None
    incomplete_details: _Incomplete | None = None


class _ChatLogprobs(msgspec.Struct, gc=False):
    content: list[TokenLogprob] | None = None
    refusal: list[TokenLogprob] | None = None


class _LegacyLogprobs(msgspec.Struct, gc=False):
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] | None = None


_COMPLETION = msgspec.json.Decoder(_Completion)
_RESPONSE = msgspec.json.Decoder(_Response)
_CHAT_LOGPROBS = msgspec.json.Decoder(_ChatLogprobs | None)
_LEGACY_LOGPROBS = msgspec.json.Decoder(_LegacyLogprobs | None)
_TEXT = msgspec.json.Decoder(str)
_TOKENS = msgspec.json.Decoder(list[TokenLogprob] | None)


class Reading(msgspec.Struct, frozen=True):
    """What a response body says.

    `logprob_spans` are the byte ranges of the values of every `logprobs` key that says something, in order; cutting them out
    (`without_logprobs`) leaves a body that is what a client that did not ask would have got. None if they cannot be told
    from equal values elsewhere in the body.
    """

    endpoint: str
    choices: tuple[Choice, ...]
    upstream_id: str | None
    model: str
    logprob_spans: tuple[tuple[int, int], ...] | None

    @property
    def is_failure(self) -> bool:
        """Whether the provider only reports that it failed (a `failed` response with nothing in it)."""
        return any(c.finish_reason == "failed" for c in self.choices) and not any(
            passage for choice in self.choices for passage in passages_of(choice)
        )


def read_response(endpoint: str, body: bytes) -> Reading:
    """Read a non-streamed 2xx body of a checked endpoint.

    Raises
    ------
    Unreadable
        If it is not such a body.
    """
    try:
        read = _read_responses(body) if endpoint == RESPONSES else _read_choices(endpoint, body)
        # What msgspec passes over must be sound too: it may have to be written again. Logprobs are read whole.
        rest = without_logprobs(body, read)
        document = orjson.loads(rest)
        if is_too_deep(rest, document):
            raise ValueError(f"nested more than {_MAX_DEPTH} levels deep")
        if read.logprob_spans and any(
            each.get("logprobs") for each in _said_in(endpoint, document)
        ):
            read = replace(read, logprob_spans=None)
    except (ValueError, RecursionError) as error:
        raise Unreadable(
            f"The provider's answer is not what {PATH_OF[endpoint]} should give: {error}."
        ) from error
    return read


def _read_choices(endpoint: str, body: bytes) -> Reading:
    completion = _COMPLETION.decode(body)
    choices, raws = [], []
    for number, choice in enumerate(completion.choices):
        path = f"choices[{number}]"
        raws.append(choice.logprobs)
        if endpoint == COMPLETIONS:
            texts = (Passage(f"{path}.text", choice.text or ""),)
            logprobs = _legacy_tokens(_LEGACY_LOGPROBS.decode(choice.logprobs))
            choices.append(
                Choice(path, texts, finish_reason=choice.finish_reason, logprobs=logprobs)
            )
        else:
            spoken = _CHAT_LOGPROBS.decode(choice.logprobs)
            tokens = (spoken.content or spoken.refusal) if spoken else None
            choices.append(_read_message(path, choice, tokens))
    spans = _spans(body, raws)
    return Reading(endpoint, tuple(choices), completion.id or None, completion.model, spans)


def _read_message(path: str, choice: _Choice, logprobs: list[TokenLogprob] | None) -> Choice:
    message = choice.message or Message()
    path_m = f"{path}.message"
    texts: list[Passage] = []
    refusals: list[Passage] = []
    if isinstance(message.content, str):
        texts.append(Passage(f"{path_m}.content", message.content))
    for number, part in enumerate(message.content if isinstance(message.content, list) else ()):
        _read_part(f"{path_m}.content[{number}]", part, texts, refusals)
    if message.audio is not None and message.audio.transcript is not None:
        texts.append(Passage(f"{path_m}.audio.transcript", message.audio.transcript))
    if message.refusal:
        refusals.append(Passage(f"{path_m}.refusal", message.refusal))
    reasonings = tuple(
        Passage(f"{path_m}.{name}", text)
        for name in ("reasoning_content", "reasoning")
        if (text := getattr(message, name))
    )
    calls = [
        _tool_call(f"{path_m}.tool_calls[{number}].{kind}", function)
        for number, call in enumerate(message.tool_calls or ())
        for kind, function in (("function", call.function), ("custom", call.custom))
        if function is not None
    ]
    if message.function_call is not None:
        calls.append(_tool_call(f"{path_m}.function_call", message.function_call))
    return Choice(
        path,
        tuple(texts),
        tuple(refusals),
        reasonings,
        tuple(calls),
        choice.finish_reason,
        logprobs,
    )


def _read_part(path: str, part: _Part, texts: list[Passage], refusals: list[Passage]) -> None:
    if part.text is not None:
        texts.append(Passage(f"{path}.text", part.text))
    if part.transcript is not None:
        texts.append(Passage(f"{path}.transcript", part.transcript))
    if part.refusal is not None:
        refusals.append(Passage(f"{path}.refusal", part.refusal))


def _tool_call(path: str, function: _Function) -> ToolCall:
    if function.arguments is None and function.input is not None:
        return ToolCall(function.name or "", Passage(f"{path}.input", function.input))
    return ToolCall(function.name or "", Passage(f"{path}.arguments", function.arguments or ""))


def _read_responses(body: bytes) -> Reading:
    response = _RESPONSE.decode(body)
    texts: list[Passage] = []
    refusals: list[Passage] = []
    reasonings: list[Passage] = []
    calls: list[ToolCall] = []
    hosted: list[Passage] = []
    raws: list[msgspec.Raw] = []
    tokens: list[TokenLogprob] = []
    for number, item in enumerate(response.output):
        path = f"output[{number}]"
        into = reasonings if item.type == "reasoning" else texts
        if isinstance(item.content, str):
            into.append(Passage(f"{path}.content", item.content))
        for kind, parts in (("summary", item.summary), ("content", item.content)):
            for position, part in enumerate(parts if isinstance(parts, list) else ()):
                _read_part(f"{path}.{kind}[{position}]", part, into, refusals)
                raws.append(part.logprobs)
                tokens += _TOKENS.decode(part.logprobs) or ()
        acts = item.type in _CLIENT_ACTS
        called, ran = (_CALLED + _ACTED, _HOSTED) if acts else (_CALLED, _ACTED + _HOSTED)
        name = item.type.removesuffix("_call") if acts else item.name or ""
        calls += (ToolCall(name, passage) for passage in _raw_passages(path, item, called))
        hosted += _raw_passages(path, item, ran)
    reason = response.incomplete_details.reason if response.incomplete_details else None
    finish = {"max_output_tokens": "length"}.get(reason or "", reason) or response.status
    choice = Choice(
        "output",
        tuple(texts),
        tuple(refusals),
        tuple(reasonings),
        tuple(calls),
        finish,
        tokens or None,
        tuple(hosted),
    )
    spans = _spans(body, raws)
    return Reading(RESPONSES, (choice,), response.id or None, response.model, spans)


def _raw_passages(path: str, item: _Item, names: Iterable[str]) -> list[Passage]:
    """What these fields of an item say: a text as it is, anything else as the JSON it is written in."""
    passages = []
    for name in names:
        raw = getattr(item, name)
        if raw is NO_RAW or (name == "result" and item.type == "image_generation_call"):
            continue
        value = bytes(raw)
        if value[:1] in b'"{[' and value not in _NOTHING:
            text = _TEXT.decode(value) if value.startswith(b'"') else value.decode()
            passages.append(Passage(f"{path}.{name}", text))
    return passages


def _legacy_tokens(logprobs: _LegacyLogprobs | None) -> list[TokenLogprob] | None:
    if logprobs is None:
        return None
    tops = logprobs.top_logprobs or [None] * len(logprobs.tokens)
    return [
        TokenLogprob(logprob, token, [TopLogprob(p) for p in top.values()] if top else None)
        for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, tops, strict=False)
    ]


#: Searching for all of a large value costs more than for its beginning, which is nearly always enough.
_PREFIX_BYTES = 64


def _spans(body: bytes, raws: Sequence[msgspec.Raw]) -> tuple[tuple[int, int], ...]:
    spans = []
    position = 0
    for raw in raws:
        value = bytes(raw)
        if not says_something(value):
            continue
        prefix = value[:_PREFIX_BYTES]
        start = body.find(prefix, position)
        while not body.startswith(value, start):
            start = body.find(prefix, start + 1)
        position = start + len(value)
        spans.append((start, position))
    return tuple(sorted(spans))


def says_something(logprobs: bytes) -> bool:
    """Whether a `logprobs` value names a token: it then has a quote in it, and so is no part of a text."""
    return b'"' in logprobs


def _said_in(endpoint: str, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Everything in a body that may have `logprobs`."""
    if endpoint != RESPONSES:
        yield from document["choices"]
        return
    for item in document["output"]:
        for parts in (item.get("summary"), item.get("content")):
            yield from parts if isinstance(parts, list) else ()


def without_logprobs(body: bytes, reading: Reading) -> bytes:
    """The body with every `logprobs` value nulled (emptied, for responses), all other bytes untouched if that can be."""
    empty = b"[]" if reading.endpoint == RESPONSES else b"null"
    if reading.logprob_spans is None:
        document = orjson.loads(body)
        for each in _said_in(reading.endpoint, document):
            if each.get("logprobs"):
                each["logprobs"] = orjson.loads(empty)
        return orjson.dumps(document)
    pieces: list[bytes] = []
    position = 0
    for start, end in reading.logprob_spans:
        pieces += (body[position:start], empty)
        position = end
    return b"".join((*pieces, body[position:])) if pieces else body


def passages_of(choice: Choice) -> Iterator[Passage]:
    """Every passage of a choice that a reviewer may correct or a check may redact."""
    yield from choice.texts
    yield from choice.refusals
    yield from choice.reasonings
    yield from (call.arguments for call in choice.tool_calls)
    yield from choice.hosted
