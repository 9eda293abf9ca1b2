"""The scripted upstream as a judge: it finds the script in what it is to judge, and replies as that says.

A judge's question holds what is judged as one line of JSON between `<<<nonce` and `nonce>>>`; see `judges.fence`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from gateway.demo.scenarios import scenario_of
from gateway.demo.script import Script, read_script, turns

_FENCED = re.compile(r"<<<(?P<nonce>[0-9a-f]{16,64})\n(?P<data>.*)\n(?P=nonce)>>>")
_KEY = re.compile(r'"([a-z][a-z0-9_]*)": \.\.\.')
_NONCE, _WHY = "nonce", "why"
_GOOD = ("yes", "5")


class Question(msgspec.Struct, frozen=True):
    """A judge's question: the nonce to repeat, the values each key of the reply may have, how the model was told to reply."""

    nonce: str
    keys: Mapping[str, tuple[str, ...]]
    script: Script

    def answered(self, script: Script) -> Script:
        """The script with the verdict it asks for as its text, unless it has a text; `NONCE` in one stands for the nonce."""
        if script.text is not None:
            return script.model_copy(update={"text": script.text.replace("NONCE", self.nonce)})
        tokens = list(self._tokens(script))
        update: dict[str, Any] = {"text": "".join(token for token, _ in tokens), "reasoning": None}
        if script.logprobs is None:
            update["logprobs"] = tuple(_entry(token, others) for token, others in tokens)
        return script.model_copy(update=update)

    def _tokens(self, script: Script) -> Iterator[tuple[str, dict[str, float]]]:
        """The pieces of the reply, each with the tokens that might stand there and their probabilities."""
        before = json.dumps({_NONCE: self.nonce}, separators=(",", ":"))[:-1]
        for key, labels in self.keys.items():
            likely = next((label for label in labels if label in _GOOD), labels[0])
            label = script.labels.get(key, script.labels.get("*", likely))
            yield f'{before},"{key}":"', {}
            rest = [other for other in labels if other != label]
            doubt = (1 - script.certainty) / max(len(rest), 1)
            yield label, {label: script.certainty, **dict.fromkeys(rest, doubt)}
            before = '"'
        why = json.dumps(script.reasoning or "That is what the script says.")
        yield f'{before},"{_WHY}":{why}}}', {}


def _entry(token: str, others: Mapping[str, float]) -> dict[str, Any]:
    tops = [_logprob(other, p) for other, p in (others or {token: 1.0}).items() if p > 0]
    return tops[0] | {"top_logprobs": sorted(tops, key=lambda top: -top["logprob"])}


def _logprob(token: str, probability: float) -> dict[str, Any]:
    return {"token": token, "bytes": list(token.encode()), "logprob": math.log(probability)}


def question_in(request: Mapping[str, Any]) -> Question | None:
    """The judge's question that a chat request asks; None if it is another request.

    Raises
    ------
    ScriptError
        If what is judged carries a script that cannot be followed.
    """
    said = [turn.text for turn in turns(request)]
    found = next((match for text in said if (match := _FENCED.search(text))), None)
    if found is None:
        return None
    model = str(request.get("model", ""))
    script = None
    for text in _strings(json.loads(found["data"])):
        if (outer := read_script(text) or scenario_of(text)) and outer.judges:
            script = outer.judges.get(model) or outer.judges.get("*")
            break
    return Question(found["nonce"], dict(_keys(request, said)), script or Script())


def _keys(request: Mapping[str, Any], said: list[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The keys to answer, from the schema of the reply, or from the prompt where there is none."""
    schema = (request.get("response_format") or {}).get("json_schema", {}).get("schema")
    if schema is None:
        yield from ((key, ("yes", "no")) for key in _KEY.findall(said[0]))
        return
    for key, value in schema["properties"].items():
        if key not in (_NONCE, _WHY):
            yield key, tuple(value.get("enum", ("yes", "no")))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for each in inner:
        yield from _strings(each)
