"""What may be changed in a response: its texts, by path, and stretches of them that are masked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import orjson

from gateway.wire import RESPONSES, Reading, Unreadable, passages_of, without_logprobs
from validators import Finding, Passage

#: A stretch of a text, in code points, and what takes its place.
Mask = tuple[int, int, str]

_STEP = re.compile(r"([A-Za-z_]+)((?:\[\d+\])*)")


def with_texts(body: bytes, texts: Mapping[str, str], reading: Reading) -> bytes:
    """The body with the passages at these paths replaced.

    Logprobs are removed: they would speak of (and spell out) tokens that are no longer there.

    Raises
    ------
    KeyError
        If a path is not that of a passage of this body.
    Unreadable
        If a text is not Unicode, or not JSON where JSON was.
    """
    document = orjson.loads(without_logprobs(body, reading))
    known = {passage.path for choice in reading.choices for passage in passages_of(choice)}
    for path, text in texts.items():
        if path not in known:
            raise KeyError(path)
        holder, key = _locate(document, path)
        holder[key] = text if isinstance(holder[key], str) else _as_json(path, text)
        if key == "transcript" and "data" in holder:
            # The recording says what its transcript said.
            holder["data"] = ""
    if reading.endpoint == RESPONSES and "output_text" in document:
        said = (texts.get(passage.path, passage.text) for passage in reading.choices[0].texts)
        document["output_text"] = "".join(said)
    try:
        return orjson.dumps(document)
    except TypeError as error:
        raise Unreadable(f"The new text cannot be written: {error}.") from error


def _as_json(path: str, text: str) -> Any:
    """What takes the place of JSON that was read as text: JSON again."""
    try:
        return orjson.loads(text)
    except ValueError as error:
        raise Unreadable(
            f"The new text of {path} is no JSON, as the old one was: {error}."
        ) from error


def _locate(document: Any, path: str) -> tuple[Any, str | int]:
    steps: list[str | int] = []
    for name, indices in _STEP.findall(path):
        steps.append(name)
        steps += (int(index) for index in indices[1:-1].split("][") if index)
    for step in steps[:-1]:
        document = document[step]
    return document, steps[-1]


def redacted_texts(reading: Reading, redactions: Iterable[Finding]) -> dict[str, str]:
    """The new text of every passage of a response that a redaction touches, by path."""
    return masked_texts([p for choice in reading.choices for p in passages_of(choice)], redactions)


def masked_texts(passages: Iterable[Passage], findings: Iterable[Finding]) -> dict[str, str]:
    """The new text of every passage that a finding touches, by path.

    Spans are offsets in the passage's own text even where a finding points inside its JSON (`path#/pointer`). Overlapping
    spans are masked once, as the union of both.
    """
    by_path: dict[str, list[Finding]] = {}
    for finding in findings:
        by_path.setdefault(finding.path.partition("#")[0], []).append(finding)
    texts = {passage.path: passage.text for passage in passages}
    return {
        path: with_masks(texts[path], united(masks_of(found))) for path, found in by_path.items()
    }


def masks_of(findings: Iterable[Finding]) -> list[Mask]:
    """The stretches that findings ask to replace, in their order."""
    return [
        (*f.span, "[redacted]" if f.replacement is None else f.replacement)
        for f in findings
        if f.span is not None
    ]


def united(masks: Iterable[Mask]) -> list[Mask]:
    """The masks by where they start; those that overlap are one, with the replacement of the first."""
    apart: list[Mask] = []
    for start, end, replacement in sorted(masks, key=lambda mask: mask[:2]):
        if apart and start < apart[-1][1]:
            apart[-1] = (apart[-1][0], max(end, apart[-1][1]), apart[-1][2])
        else:
            apart.append((start, end, replacement))
    return apart


def with_masks(text: str, masks: Iterable[Mask], offset: int = 0) -> str:
    """The part of a longer text that begins at `offset`, masked; `masks` are of the longer text and united."""
    parts: list[str] = []
    at, end = offset, offset + len(text)
    for left, right, replacement in masks:
        if left < end and right > offset:
            parts.append(text[at - offset : max(left, at) - offset])
            parts.append(replacement if left >= offset else "")
            at = min(right, end)
    return "".join((*parts, text[at - offset :]))
