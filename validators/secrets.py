"""Credentials in a response, known by their prefix, and assignments that look like one.

Formats are those the issuers document (for instance https://docs.github.com/authentication/keeping-your-account-and-data-secure/
about-authentication-to-github#githubs-token-formats); every match must also look random, so that placeholders pass.
"""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections import Counter
from enum import StrEnum
from typing import Annotated, Literal, NamedTuple, Self

import orjson
from pydantic import Field, model_validator

from validators.scan import Accept, Rule, Scan, Scanner


class SecretKind(StrEnum):
    """Whose credential it is; `generic` is any password or key in an assignment."""

    ANTHROPIC = "anthropic"
    AWS = "aws"
    GENERIC = "generic"
    GITHUB = "github"
    GITLAB = "gitlab"
    GOOGLE = "google"
    JWT = "jwt"
    NPM = "npm"
    OPENAI = "openai"
    PRIVATE_KEY = "private_key"
    PYPI = "pypi"
    SENDGRID = "sendgrid"
    SLACK = "slack"
    STRIPE = "stripe"
    TWILIO = "twilio"


_PLACEHOLDER = re.compile(
    r"example|sample|dummy|placeholder|redacted|changeme|your|xxxx|\*\*\*\*|\.\.\.|1234567|abcdefg|(.)\1{5}",
    re.IGNORECASE,
)
#: Bits per character: random base64 of 20 characters has about 4, random hexadecimal of 32 about 3.5, words below 3.
_MIN_ENTROPY = 3.0
_MIN_CHOSEN_ENTROPY = 2.5
_MIN_KEY_ENTROPY = 3.5
_MIN_KEY_CHARS = 64
_MAX_HEADER_CHARS = 1_000


def entropy(text: str) -> float:
    """Shannon entropy of the characters of a text in bits per character; 0 for the empty text.

    Examples
    --------
    >>> entropy("aaaa"), entropy("abcd")
    (0.0, 2.0)
    """
    size = len(text)
    return sum(count / size * math.log2(size / count) for count in Counter(text).values())


def _random(text: str, start: int, end: int) -> tuple[int, int] | None:
    token = text[start:end]
    if _PLACEHOLDER.search(token) or entropy(token) < _MIN_ENTROPY:
        return None
    return start, end


def _assigned(text: str, start: int, end: int) -> tuple[int, int] | None:
    """The value of an assignment, if it could be a real one: mixed, and not from a template.

    What is called a password need not look random; a key or token must, because so much else is called that.
    """
    head = _ASSIGNMENT_HEAD.match(text, start, end)
    begin = head.end() if head else start
    value = text[begin:end]
    kinds = [any(test(char) for char in value) for test in (str.isdigit, str.islower, str.isupper)]
    if not kinds[0] or not any(kinds[1:]) or _PLACEHOLDER.search(value):
        return None
    bits = entropy(value)
    chosen = text[start:end].lower().startswith("pass") or text[start:end].lower().startswith("pwd")
    likely = bits >= _MIN_CHOSEN_ENTROPY if chosen else all(kinds) or bits >= _MIN_KEY_ENTROPY
    return (begin, end) if likely else None


def _signed(text: str, start: int, end: int) -> tuple[int, int] | None:
    """A token whose header decodes to a JOSE header (RFC 7515, section 4)."""
    header = text[start:end].partition(".")[0][:_MAX_HEADER_CHARS]
    try:
        decoded = orjson.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except (binascii.Error, orjson.JSONDecodeError):
        return None
    return (start, end) if isinstance(decoded, dict) and "alg" in decoded else None


def _keyed(text: str, start: int, end: int) -> tuple[int, int] | None:
    """A PEM block with enough in it to be a key."""
    body = text[start:end].partition("KEY")[2]
    return (start, end) if sum(char.isalnum() for char in body) >= _MIN_KEY_CHARS else None


_ASSIGNMENT = (
    r"(?i)(?:password|passwd|passphrase|pwd|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credential)"
    r"s?(?:[_-][\w-]{1,20})?[\"']?\s{0,3}(?::=|=>|[:=])\s{0,3}[\"']?"
)
_ASSIGNMENT_HEAD = re.compile(_ASSIGNMENT)


class _Shape(NamedTuple):
    kind: SecretKind
    what: str
    pattern: str
    accept: Accept = _random


_SHAPES = (
    _Shape(SecretKind.ANTHROPIC, "an Anthropic API key", r"\bsk-ant-[A-Za-z0-9_-]{20,200}"),
    _Shape(SecretKind.AWS, "an AWS access key id", r"\b(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}\b"),
    _Shape(
        SecretKind.GITHUB,
        "a GitHub token",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})\b",
    ),
    _Shape(
        SecretKind.GITLAB,
        "a GitLab token",
        r"\bgl(?:pat|dt|rt|ptt|soat|ft|cbt)-[A-Za-z0-9_.-]{20,100}",
    ),
    _Shape(
        SecretKind.GOOGLE,
        "a Google credential",
        r"\b(?:AIza[A-Za-z0-9_-]{35}|GOCSPX-[A-Za-z0-9_-]{28}|ya29\.[A-Za-z0-9_-]{30,500})",
    ),
    _Shape(
        SecretKind.JWT,
        "a JSON web token",
        r"\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{4,}\.[A-Za-z0-9_-]*",
        _signed,
    ),
    _Shape(SecretKind.NPM, "an npm token", r"\bnpm_[A-Za-z0-9]{36}\b"),
    _Shape(
        SecretKind.OPENAI,
        "an OpenAI API key",
        r"\bsk-(?:(?:proj|svcacct|admin|None)-[A-Za-z0-9_-]{20,200}|[A-Za-z0-9]{32,64}\b)",
    ),
    _Shape(
        SecretKind.PRIVATE_KEY,
        "a private key",
        r"-----BEGIN (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----(?:-?[^-])*"
        r"(?:-----END (?:[A-Z0-9]+ ){0,4}PRIVATE KEY(?: BLOCK)?-----)?",
        _keyed,
    ),
    _Shape(SecretKind.PYPI, "a PyPI token", r"\bpypi-AgE[A-Za-z0-9_-]{40,500}"),
    _Shape(SecretKind.SENDGRID, "a SendGrid key", r"\bSG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"),
    _Shape(
        SecretKind.SLACK,
        "a Slack credential",
        r"\b(?:xox[abeoprs]-[A-Za-z0-9-]{10,250}|xapp-\d-[A-Za-z0-9-]{10,250}"
        r"|hooks\.slack\.com/services/T[A-Z0-9]{6,12}/B[A-Z0-9]{6,12}/[A-Za-z0-9]{20,30})",
    ),
    _Shape(
        SecretKind.STRIPE,
        "a Stripe key",
        r"\b(?:(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,250}|whsec_[A-Za-z0-9+/=]{24,64})",
    ),
    _Shape(SecretKind.TWILIO, "a Twilio API key", r"\bSK[0-9a-f]{32}\b"),
    _Shape(
        SecretKind.GENERIC,
        "a password or key in an assignment",
        _ASSIGNMENT + r"[A-Za-z0-9+/=_.~!@#$%^&*?-]{8,200}",
        _assigned,
    ),
)


class Secrets(Scan):
    """Fails where a response holds something that looks like a live credential. Findings never quote it."""

    use: Literal["secrets"]
    kinds: Annotated[tuple[SecretKind, ...], Field(min_length=1)] = tuple(SecretKind)

    @model_validator(mode="after")
    def _compile(self) -> Self:
        self._scanner = Scanner(
            [
                Rule(
                    shape.kind.value,
                    shape.pattern,
                    f"holds {shape.what}",
                    f"[redacted:{shape.kind}]",
                    accept=shape.accept,
                )
                for shape in _SHAPES
                if shape.kind in self.kinds
            ]
        )
        return self
