"""Personal data in a response: only what a checksum, a numbering plan or a fixed form can confirm, no guessing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from enum import StrEnum
from ipaddress import ip_address
from typing import Annotated, Literal, NamedTuple, Self

import phonenumbers
from pydantic import Field, model_validator

from validators.scan import Accept, Rule, Scan, Scanner


class PiiKind(StrEnum):
    """What kind of personal datum."""

    CARD = "card"
    EMAIL = "email"
    IBAN = "iban"
    IP = "ip"
    PHONE = "phone"
    US_SSN = "us_ssn"


#: Issuer ranges: first digits (from, to) and the lengths their numbers have (ISO/IEC 7812; the schemes' own documents).
_ISSUERS = (
    ("4", "4", (13, 16, 19)),  # Visa
    ("51", "55", (16,)),  # Mastercard
    ("2221", "2720", (16,)),  # Mastercard
    ("34", "34", (15,)),  # American Express
    ("37", "37", (15,)),
    ("300", "305", (14, 16, 19)),  # Diners Club
    ("36", "36", (14, 16, 19)),
    ("38", "39", (14, 16, 19)),
    ("6011", "6011", (16, 19)),  # Discover
    ("644", "659", (16, 19)),
    ("3528", "3589", (16, 19)),  # JCB
    ("62", "62", (16, 17, 18, 19)),  # UnionPay
    ("2200", "2204", (16, 19)),  # Mir
    ("5018", "5018", (13, 15, 16, 19)),  # Maestro
    ("5020", "5020", (13, 15, 16, 19)),
    ("5038", "5038", (13, 15, 16, 19)),
    ("6304", "6304", (13, 15, 16, 19)),
    ("6759", "6763", (13, 15, 16, 19)),
)
_DOUBLED = str.maketrans("0123456789", "0246813579")

#: Length of an IBAN by country (SWIFT IBAN registry, release 99).
_IBAN_CHARS = {
    country: int(length)
    for length, countries in {
        "15": "NO",
        "16": "BE",
        "18": "DK FI FK FO GL NL SD",
        "19": "MK SI",
        "20": "AT BA EE KZ LT LU MN XK",
        "21": "CH HR LI LV",
        "22": "BG BH CR DE GB GE IE ME RS VA",
        "23": "AE GI IL IQ OM SO TL",
        "24": "AD CZ ES MD PK RO SA SE SK TN VG",
        "25": "LY PT ST",
        "26": "IS TR",
        "27": "BI DJ FR GR IT MC MR SM",
        "28": "AL AZ BY CY DO GT HN HU LB NI PL SV",
        "29": "BR EG PS QA UA",
        "30": "JO KW MU YE",
        "31": "MT SC",
        "32": "LC",
        "33": "RU",
    }.items()
    for country in countries.split()
}

_HEX = frozenset("0123456789abcdefABCDEF")
_MAX_LOCAL_PART_CHARS = 64
_MAX_DOMAIN_CHARS = 253


def luhn(digits: str) -> bool:
    """Whether a string of decimal digits carries a right check digit (ISO/IEC 7812-1, annex B).

    Examples
    --------
    >>> luhn("4242424242424242"), luhn("4242424242424241")
    (True, False)
    """
    total = sum(map(int, digits[-1::-2])) + sum(map(int, digits[-2::-2].translate(_DOUBLED)))
    return total % 10 == 0


def iban_is_valid(iban: str) -> bool:
    """Whether an IBAN without spaces has its country's length and right check digits (ISO 13616, MOD 97-10).

    Examples
    --------
    >>> iban_is_valid("GB82WEST12345698765432"), iban_is_valid("GB82WEST12345698765433")
    (True, False)
    """
    if _IBAN_CHARS.get(iban[:2].upper()) != len(iban):
        return False
    return int("".join(str(int(char, 36)) for char in iban[4:] + iban[:4])) % 97 == 1


def _stops(text: str, start: int, end: int) -> Iterator[int]:
    """Where a number written in groups may end: at the end of the match, or up to three groups before."""
    yield end
    for _ in range(3):
        while end > start and text[end - 1].isdecimal():
            end -= 1
        while end > start and not text[end - 1].isdecimal():
            end -= 1
        yield end


def _card(text: str, start: int, end: int) -> tuple[int, int] | None:
    if start > 1 and text[start - 1] in ".," and text[start - 2].isdigit():
        return None  # the fraction of a number
    for stop in _stops(text, start, end):
        digits = re.sub(r"\D", "", text[start:stop])
        issued = any(
            low <= digits[: len(low)] <= high and len(digits) in lengths
            for low, high, lengths in _ISSUERS
        )
        if issued and luhn(digits):
            return start, stop
    return None


def _iban(text: str, start: int, end: int) -> tuple[int, int] | None:
    """The IBAN at the start of a match, which may have run on into the next word."""
    left = _IBAN_CHARS.get(text[start : start + 2].upper(), 0)
    position = start
    while left and position < end:
        left -= text[position] != " "
        position += 1
    if left or text[position : position + 1].isalnum():
        return None
    iban = text[start:position].replace(" ", "")
    return (start, position) if iban_is_valid(iban) else None


def _email(text: str, start: int, end: int) -> tuple[int, int] | None:
    """An address within the limits of RFC 5321, section 4.5.3.1."""
    local, _, domain = text[start:end].rpartition("@")
    if not local or len(local) > _MAX_LOCAL_PART_CHARS or len(domain) > _MAX_DOMAIN_CHARS:
        return None
    return None if ".." in local else (start, end)


def _ssn(text: str, start: int, end: int) -> tuple[int, int] | None:
    """A number the Social Security Administration may have issued: no area 000, 666 or 9xx, no group 00, no serial 0000."""
    area, group, serial = re.split(r"\D", text[start:end])
    issued = area not in ("000", "666") and area < "900" and group != "00" and serial != "0000"
    return (start, end) if issued else None


def _ip(text: str, start: int, end: int) -> tuple[int, int] | None:
    written = text[start:end].rstrip(".:")
    group, colon, _ = written.partition(":")
    before = text[max(start - 1, 0) : start]
    if colon and (before == ":" or (len(group) < 4 and before in _HEX)):
        return None  # the end of a longer address
    try:
        address = ip_address(written)
    except ValueError:
        return None
    return (start, start + len(written)) if address.is_global else None


def _phone(region: str | None) -> Accept:
    def accept(text: str, start: int, end: int) -> tuple[int, int] | None:
        for stop in _stops(text, start, end):
            try:
                number = phonenumbers.parse(text[start:stop], region)
            except phonenumbers.NumberParseException:
                continue
            if phonenumbers.is_valid_number(number):
                return start, stop
        return None

    return accept


class _Form(NamedTuple):
    kind: PiiKind
    what: str
    pattern: str
    accept: Accept
    overlapping: bool = False
    longest: int | None = None


_CARD = r"\b(?:\d{13,19}|\d{4}[ -]\d{4}[ -]\d{4}[ -]\d{1,4}(?:[ -]\d{1,3})?|3\d{3}[ -]\d{6}[ -]\d{4,5}|\d(?:[ -]\d){12,18})\b"
_FORMS = (
    _Form(PiiKind.CARD, "a card number", _CARD, _card, overlapping=True),
    _Form(
        PiiKind.EMAIL,
        "an e-mail address",
        r"[\pL\pN][\pL\pN._%+'-]*@(?:[\pL\pN](?:[\pL\pN-]*[\pL\pN])?\.)+\pL{2,24}\b",
        _email,
        longest=_MAX_LOCAL_PART_CHARS + 1 + _MAX_DOMAIN_CHARS,
    ),
    _Form(
        PiiKind.IBAN,
        "a bank account (IBAN)",
        r"(?i)\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b",
        _iban,
        overlapping=True,
    ),
    _Form(
        PiiKind.IP,
        "an IP address",
        r"\b\d{1,3}(?:\.\d{1,3}){3}\b|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?:\d{0,3}(?:\.\d{1,3}){3})?",
        _ip,
        overlapping=True,
    ),
    _Form(
        PiiKind.US_SSN,
        "a US social security number",
        r"\b\d{3}(?:-\d{2}-|[ ]\d{2}[ ])\d{4}\b",
        _ssn,
    ),
)
_INTERNATIONAL = r"\+\d(?:[ ()./-]{0,2}\d){6,14}\b"
_NATIONAL = r"(?:\+|\b|\()\d(?:[ ()./-]{0,2}\d){5,14}\b"


def _is_region(region: str) -> bool:
    return region in phonenumbers.SUPPORTED_REGIONS


class Pii(Scan):
    """Fails where a response holds personal data of the given kinds. Findings never quote it.

    Phone numbers are found in international form; with `region` (ISO 3166-1, such as `DE`) also as written in that country.
    Only public IP addresses count.
    """

    use: Literal["pii"]
    kinds: Annotated[tuple[PiiKind, ...], Field(min_length=1)] = (
        PiiKind.CARD,
        PiiKind.IBAN,
        PiiKind.EMAIL,
        PiiKind.PHONE,
    )
    region: str | None = None

    @model_validator(mode="after")
    def _compile(self) -> Self:
        if self.region is not None and not _is_region(self.region):
            raise ValueError(
                f"{self.region!r} is no region phone numbers are known for; write DE, US, ..."
            )
        if self.region is not None and PiiKind.PHONE not in self.kinds:
            raise ValueError("region is for phone numbers; add phone to kinds or leave region out")
        phone = _Form(
            PiiKind.PHONE,
            "a phone number",
            _NATIONAL if self.region else _INTERNATIONAL,
            _phone(self.region),
            overlapping=True,
        )
        self._scanner = Scanner(
            [
                Rule(
                    form.kind.value,
                    form.pattern,
                    f"holds {form.what}",
                    f"[redacted:{form.kind}]",
                    accept=form.accept,
                    overlapping=form.overlapping,
                    longest=form.longest,
                )
                for form in (*_FORMS, phone)
                if form.kind in self.kinds
            ]
        )
        return self
