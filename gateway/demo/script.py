"""The script: what to say and how to misbehave, carried by the request itself.

A user message (chat), `input` (responses) or `prompt` (completions) that is or contains `{"demo":
{...}}` is steered by that object. The newest such message counts, so that an answer asked for again
with feedback is still steered.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StringConstraints, ValidationError

Fault = Literal[
    "hang",
    "close",
    "close_mid",
    "truncate",
    "garbage",
    "error_mid",
    "after_done",
    "odd_sse",
    "html502",
    "slow_headers",
    "wrong_type",
    "huge",
    "invalid_utf8",
]

HeaderName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9!#$%&'*+.^_`|~-]+$")]
HeaderValue = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]*$")]


class ScriptError(ValueError):
    """A script that cannot be followed; the message says what is wrong in it."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ScriptedCall(_Strict):
    """A tool call; `arguments` is an object, or the raw text where it is to be broken JSON."""

    name: str
    arguments: dict[str, JsonValue] | str = Field(default_factory=dict)

    @property
    def text(self) -> str:
        """The arguments as the model writes them."""
        return self.arguments if isinstance(self.arguments, str) else json.dumps(self.arguments)


class Extra(_Strict):
    """Fields nobody has heard of, merged into the answer.

    `body` goes into the body, and into every chunk of a stream; `choice` into every choice (output
    item); `message` into every message or delta (content part).
    """

    body: dict[str, JsonValue] = Field(default_factory=dict)
    choice: dict[str, JsonValue] = Field(default_factory=dict)
    message: dict[str, JsonValue] = Field(default_factory=dict)


class Script(_Strict):
    """What to answer.

    Said: `text`, or `texts` for several choices; `refusal`; `reasoning`; `tool_calls`; `echo: true`
    makes the text a JSON object of what the server received (`method`, `path`, `query`, `headers`,
    `body`). `finish_reason` and `usage` override what follows from that.

    Logprobs, given only when asked for: drawn from `certainty`, in [0, 1], or `logprobs`:
    "constant" (every token certain), "null", "absent", or the list of entries to send as they are.

    Failure: `status` and `error` (merged into the error object) with `headers`; `delay_ms` before
    the first byte, `token_delay_ms` between the pieces of a stream; `fault`; `size_mb` for `fault:
    huge`; `encoding` compresses the body whatever the client accepts.

    As a judge: `judges` are the scripts of judges' models (`*`: of any other) when this request, or the answer to it, is
    judged. Such a script has `labels` by criterion (`*`: of any other; default: the good one) given with the probability
    `certainty`, and its reasons in `reasoning`; or a `text`, in which NONCE stands for the judge's nonce.

    Again: `attempts` are the scripts of successive attempts, the last one repeating. With an `id`
    every request with that id counts; without, the conversation does (how often somebody spoke
    again after the script).
    """

    text: str | None = None
    texts: tuple[str, ...] = Field(default=(), max_length=16)
    refusal: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[ScriptedCall, ...] = ()
    finish_reason: str | None = None
    certainty: Annotated[float, Field(ge=0, le=1)] = 0.97
    logprobs: Literal["constant", "null", "absent"] | tuple[dict[str, JsonValue], ...] | None = None
    echo: bool = False
    usage: dict[str, JsonValue] = Field(default_factory=dict)
    extra: Extra = Extra()

    status: Annotated[int, Field(ge=200, le=599)] | None = None
    error: dict[str, JsonValue] | None = None
    headers: dict[HeaderName, HeaderValue] = Field(default_factory=dict)
    delay_ms: Annotated[float, Field(ge=0, le=600_000)] = 0
    token_delay_ms: Annotated[float, Field(ge=0, le=60_000)] = 0
    fault: Fault | None = None
    size_mb: Annotated[int, Field(ge=1, le=256)] = 16
    encoding: Literal["gzip", "deflate", "zstd"] | None = None

    judges: dict[str, Script] = Field(default_factory=dict)
    labels: dict[str, str] = Field(default_factory=dict)

    id: str | None = None
    attempts: tuple[Script, ...] = ()

    def attempt(self, number: int) -> Script:
        """The script of the attempt with that number, from 0; this one if it has no attempts."""
        return self.attempts[min(number, len(self.attempts) - 1)] if self.attempts else self


class Turn(NamedTuple):
    """Somebody speaking: `user`, `assistant`, or `other` (system, tools)."""

    speaker: Literal["user", "assistant", "other"]
    text: str


_OPENING = re.compile(r'\{\s*"demo"\s*:')


def read_script(text: str) -> Script | None:
    """The script that a text is or contains; None if there is none.

    Raises
    ------
    ScriptError
        If there is one and it is not JSON, or says what a script cannot say.
    """
    opening = _OPENING.search(text)
    if opening is None:
        return None
    try:
        found, _ = json.JSONDecoder().raw_decode(text, opening.start())
        return Script.model_validate(found["demo"])
    except json.JSONDecodeError as error:
        raise ScriptError(f"The demo script is not JSON: {error}.") from error
    except RecursionError as error:
        raise ScriptError("The demo script is nested too deeply.") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"]) or "demo"
        raise ScriptError(f"The demo script is wrong at {place!r}: {first['msg']}.") from error


def times_answered(later: Sequence[Turn]) -> int:
    """How often somebody other than the model spoke in these turns: runs of such turns."""
    runs, listening = 0, False
    for turn in later:
        if turn.speaker == "assistant":
            listening = False
        elif not listening:
            runs, listening = runs + 1, True
    return runs


def turns(request: Mapping[str, Any]) -> list[Turn]:
    """Who said what in a request of any dialect, oldest first; malformed turns are passed over."""
    if "prompt" in request:
        prompt = request["prompt"]
        prompts = prompt if isinstance(prompt, list) else [prompt]
        return [Turn("user", text) for text in prompts if isinstance(text, str)]
    spoken = request.get("messages", request.get("input"))
    if isinstance(spoken, str):
        return [Turn("user", spoken)]
    items = spoken if isinstance(spoken, list) else ()
    return [_turn(item) for item in items if isinstance(item, dict)]


def _turn(item: Mapping[str, Any]) -> Turn:
    content = item.get("content", item.get("output"))
    parts = content if isinstance(content, list) else [content]
    text = "".join(
        part if isinstance(part, str) else str(part.get("text", ""))
        for part in parts
        if isinstance(part, str | dict)
    )
    role = item.get("role")
    if role == "user":
        return Turn("user", text)
    if role == "assistant" or item.get("type") in ("function_call", "reasoning"):
        return Turn("assistant", text)
    return Turn("other", text)
