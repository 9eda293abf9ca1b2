"""Check digits and entropy."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from tests.validators.exchanges import check_of, covered, said
from validators import Outcome
from validators.pii import iban_is_valid, luhn
from validators.secrets import entropy

DIGITS = st.text(alphabet="0123456789", min_size=12, max_size=18)


def with_check_digit(digits: str) -> str:
    return next(digits + last for last in "0123456789" if luhn(digits + last))


@given(DIGITS)
def test_every_number_has_exactly_one_check_digit(digits: str) -> None:
    assert sum(luhn(digits + last) for last in "0123456789") == 1


@given(digits=DIGITS, data=st.data())
def test_one_wrong_digit_breaks_the_checksum(digits: str, data: st.DataObject) -> None:
    number = with_check_digit(digits)
    place = data.draw(st.integers(0, len(number) - 1))
    wrong = data.draw(st.sampled_from([d for d in "0123456789" if d != number[place]]))

    assert not luhn(number[:place] + wrong + number[place + 1 :])


@given(
    digits=st.text(alphabet="0123456789", min_size=14, max_size=14),
    separator=st.sampled_from(["", " ", "-"]),
    before=st.sampled_from(["", "card: ", "12 ", "(", "no."]),
    after=st.sampled_from(["", ".", ")", " 123", ", thanks"]),
)
def test_card_numbers_are_found_however_they_are_written(
    digits: str, separator: str, before: str, after: str
) -> None:
    number = with_check_digit("4" + digits)
    written = separator.join(number[start : start + 4] for start in range(0, 16, 4))
    exchange = said(before + written + after)

    result = check_of("pii", kinds=["card"]).run(exchange)

    assert result.outcome is Outcome.FAIL
    (found,) = covered(exchange, result)
    assert written in found or found in (before + written + after)


@given(st.text(alphabet="0123456789", min_size=18, max_size=18))
def test_account_numbers_have_exactly_one_pair_of_check_digits(account: str) -> None:
    valid = [pair for pair in range(2, 99) if iban_is_valid(f"DE{pair:02}{account}")]

    assert len(valid) == 1


def test_iban_of_an_unknown_country_is_not_valid() -> None:
    assert not iban_is_valid("ZZ82WEST12345698765432")


@given(st.text(max_size=100))
def test_entropy_lies_between_none_and_that_of_all_characters_different(text: str) -> None:
    assert 0 <= entropy(text) <= math.log2(max(len(set(text)), 1)) + 1e-9
