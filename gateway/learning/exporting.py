"""Labels as files for others: fine-tuning, preferences, calibration, and the measuring of judges.

A format gives a sample's lines, or says why it has none. Lines come in the order of decision ids, so that the same labels give the same
file. Bodies are read page by page: memory does not grow with the number of samples.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import orjson

from gateway import wire
from gateway.calibrating.labels import labelled
from gateway.learning.chat import NotChat, answer_of, conversation
from gateway.learning.samples import Outcome, Sample
from policies import Policy

Line = dict[str, Any]


class Format(StrEnum):
    """What a file is for."""

    SFT = "sft"
    PREFERENCE = "preference"
    KTO = "kto"
    LABELS = "labels"
    EVAL = "eval"


class LeftOut(Exception):
    """A sample has no line in a format; the message says why, in words that count as one reason."""


def sft(sample: Sample) -> list[Line]:
    """What OpenAI's supervised fine-tuning takes: the conversation, ending with what people approved or wrote."""
    if sample.outcome is Outcome.REJECTED:
        raise LeftOut("rejected, not corrected")
    return [_conversation(sample, _wanted(sample))]


def preference(sample: Sample) -> list[Line]:
    """What OpenAI's preference fine-tuning takes: the correction over the answer of the model."""
    if sample.outcome is not Outcome.CORRECTED:
        raise LeftOut("not corrected")
    whole = _conversation(sample, _wanted(sample))
    rejected = _conversation(sample, _kept(sample.response))["messages"][-1:]
    chosen = whole["messages"][-1:]
    given = {**whole, "messages": whole["messages"][:-1]}
    sides = {"preferred_output": chosen, "non_preferred_output": rejected}
    return [_unweighted({"input": given, **sides})]


def kto(sample: Sample) -> list[Line]:
    """What TRL's KTO trainer takes: answers that are desirable or not; a correction is one more answer, and desirable."""
    found = [(_kept(sample.response), sample.outcome is Outcome.APPROVED)]
    if sample.outcome is Outcome.CORRECTED:
        found.append((_kept(sample.correction), True))
    lines = []
    for body, is_desirable in found:
        whole = _conversation(sample, body)
        line = {
            "prompt": whole["messages"][:-1],
            "completion": whole["messages"][-1:],
            "label": is_desirable,
        }
        lines.append(_unweighted(line | {k: whole[k] for k in ("tools",) if k in whole}))
    return lines


def judged(sample: Sample) -> list[Line]:
    """What `holdgate judge eval --labels` reads."""
    request, response = _kept(sample.request), _kept(sample.response)
    line = {
        "id": sample.decision.id,
        "request": orjson.loads(request),
        "response": orjson.loads(response),
        "acceptable": sample.label.acceptable,
        "group": sample.policy,
    }
    wire.parse_request(request)
    wire.read_response(sample.decision.endpoint, response)
    return [line]


def labels(policies: Mapping[str, Policy]) -> Callable[[Sample], list[Line]]:
    """What `holdgate calibrate fit --labels` reads: the fields of `policies.labelled.Labelled`; no content."""

    def line(sample: Sample) -> list[Line]:
        policy = policies.get(sample.policy)
        if policy is None:
            raise LeftOut("its policy is gone")
        found = labelled(sample.label, policy)
        if found is None:
            raise LeftOut("nobody knows how likely it was to be labelled")
        return [msgspec.to_builtins(found)]

    return line


def _kept(body: bytes | None) -> bytes:
    if body is None:
        raise LeftOut("no content kept")
    return body


def _wanted(sample: Sample) -> bytes:
    """The body with what people want said."""
    return _kept(sample.correction if sample.outcome is Outcome.CORRECTED else sample.response)


def _conversation(sample: Sample, body: bytes) -> Line:
    endpoint = sample.decision.endpoint
    request = wire.parse_request(_kept(sample.request))
    return conversation(endpoint, request, answer_of(endpoint, body))


def _unweighted(value: Any) -> Any:
    """The same without weights, which only supervised fine-tuning has."""
    if isinstance(value, dict):
        is_message = "role" in value
        return {k: _unweighted(v) for k, v in value.items() if not (is_message and k == "weight")}
    return [_unweighted(each) for each in value] if isinstance(value, list) else value


async def lines(
    found: AsyncIterator[Sample], form: Callable[[Sample], list[Line]], left_out: Counter[str]
) -> AsyncIterator[bytes]:
    """The lines of a file; `left_out` counts the samples that have none, by reason."""
    async for sample in found:
        try:
            if sample.outcome is Outcome.DISPUTED:
                raise LeftOut("its labels disagree")
            made = form(sample)
        except LeftOut as error:
            left_out[str(error)] += 1
        except NotChat:
            left_out["cannot be written as a conversation"] += 1
        except (wire.Unreadable, orjson.JSONDecodeError):
            left_out["unreadable"] += 1
        else:
            for each in made:
                yield orjson.dumps(each) + b"\n"


@contextmanager
def written(path: Path | None) -> Iterator[BinaryIO]:
    """A file that is there whole or not at all; standard output for None. It is its owner's alone."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.flush()
        return
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
