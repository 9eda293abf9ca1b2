"""Fences around what is judged: data that cannot end its fence, look like one, or be read as words to the judge.

The document is written as JSON in ASCII on a single line, so that no line break, no letter that only looks like another and no
invisible character reaches the judge as such. Angle brackets are escaped, and so is the last digit of the nonce wherever
the document holds it: what stands between the fences then contains neither a fence nor the nonce, and reads the same once
parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from validators import JSON

_NONCE = re.compile(r"[0-9a-f]{16,64}")
_BRACKET = re.compile(r"[<>]")

OPENING, CLOSING = "<<<", ">>>"


def fenced(document: Mapping[str, JSON], nonce: str) -> str:
    """The document as three lines: `<<<nonce`, its JSON, `nonce>>>`.

    Raises
    ------
    ValueError
        If the nonce is not 16 to 64 lower-case hexadecimal digits.
    """
    if not _NONCE.fullmatch(nonce):
        raise ValueError("a nonce is 16 to 64 lower-case hexadecimal digits")
    return f"{OPENING}{nonce}\n{as_data(document, nonce)}\n{nonce}{CLOSING}"


def as_data(document: Mapping[str, JSON], nonce: str | None = None) -> str:
    """The document as one line of ASCII JSON without angle brackets and without the nonce, in either case."""
    text = _BRACKET.sub(_escaped, json.dumps(document, ensure_ascii=True, allow_nan=False))
    # To look first is what keeps a pattern from being compiled for every nonce.
    if nonce is None or nonce[:-1] not in text.lower():
        return text
    # The last digit is never part of an escape, and with all digits behind it no escape is followed by one.
    return re.sub(f"(?i)({nonce[:-1]})({nonce[-1]}[0-9a-f]*)", _broken, text)


def _escaped(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def _broken(match: re.Match[str]) -> str:
    return match[1] + "".join(f"\\u{ord(digit):04x}" for digit in match[2])
