"""The corpus of attacks and of answers that are none, in the halves it was made in."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import gateway

FOLDER = Path(gateway.__file__).parent / "evaluation"


def rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]


ATTACKS = rows("attacks.jsonl")
BENIGN = rows("benign.jsonl")


def is_held_out(row: dict[str, str]) -> bool:
    """Whether a row belongs to the half that the rules were not tuned on."""
    return hashlib.sha256(row["id"].encode()).digest()[0] % 2 == 1
