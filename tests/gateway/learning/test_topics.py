"""Picking and grouping by words: deterministic, and no better than words allow."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.learning.topics import MOST_GROUPED, groups, pick

ORDERS = [f"Where is my parcel, order {n}? The courier never came." for n in range(40)]
REFUNDS = [
    f"Please refund the duplicate charge on card {n}, it was billed twice." for n in range(6)
]
LOGINS = [f"I cannot log in, the password reset mail {n} does not arrive." for n in range(3)]


def embeddings(sizes: list[int], *, common: float) -> list[list[float]]:
    """Vectors of so many texts of each kind: what is common to all, what is of the kind, and what is the text's own."""
    draw = np.random.default_rng(1)
    every, kinds = draw.normal(size=64), draw.normal(size=(len(sizes), 64))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    found: list[list[float]] = (
        common * every + kinds[owner] + 0.4 * draw.normal(size=(len(owner), 64))
    ).tolist()
    return found


class TestPick:
    def test_the_first_weighs_most(self) -> None:
        assert pick(["a word", "other word", "third thing"], [1.0, 5.0, 2.0], 1) == [1]

    def test_of_equal_weight_every_kind_comes_before_a_second_of_one(self) -> None:
        texts = ORDERS + REFUNDS + LOGINS
        first = pick(texts, [1.0] * len(texts), 3)
        kinds = [0 if place < 40 else 1 if place < 46 else 2 for place in first]
        assert sorted(kinds) == [0, 1, 2]

    def test_what_says_the_same_is_picked_once(self) -> None:
        assert pick(["the same words"] * 5 + ["something else"], [1.0] * 6, 6) == [0, 5]

    def test_covers_more_kinds_than_the_uncertain_alone(self) -> None:
        """Sixty questions of one kind are the least sure; forty of forty other kinds are a little surer."""
        common = [f"reset password mail {n % 3}" for n in range(60)]
        rare = [f"kind{n} topic{n} matter{n}" for n in range(40)]
        weights = [2.0] * 60 + [1.5] * 40
        assert sum(place >= 60 for place in pick(common + rare, weights, 40)) >= 36

    @given(
        st.lists(st.text(max_size=20), max_size=12).flatmap(
            lambda texts: st.tuples(
                st.just(texts),
                st.lists(st.floats(0.99, 100), min_size=len(texts), max_size=len(texts)),
            )
        ),
        st.integers(0, 15),
    )
    @settings(max_examples=60, deadline=None)
    def test_places_are_different_in_bounds_and_always_the_same(
        self, given_: tuple[list[str], list[float]], count: int
    ) -> None:
        texts, weights = given_
        found = pick(texts, weights, count)
        assert len(found) == len(set(found)) <= min(count, len(texts))
        assert all(0 <= place < len(texts) for place in found)
        assert found == pick(texts, weights, count)
        if texts and count:
            assert weights[found[0]] == max(weights)


class TestGroups:
    def test_what_is_alike_is_together_the_greatest_first(self) -> None:
        found = groups(REFUNDS + ORDERS + LOGINS)
        assert [len(group.members) for group in found] == [40, 6, 3]
        assert set(found[1].members) == set(range(6))
        assert {"parcel", "courier"} & set(found[0].terms)
        assert {"password", "log", "mail", "reset"} & set(found[2].terms)

    @pytest.mark.parametrize(
        "texts", [[""], ["", ""], ["the"], ["??", "!!"], ["one"], ["a b", "a b"]]
    )
    def test_texts_without_words_or_company_are_one_group(self, texts: list[str]) -> None:
        (group,) = groups(texts)
        assert sorted(group.members) == list(range(len(texts)))

    @given(st.lists(st.text(max_size=30), max_size=15))
    @settings(max_examples=60, deadline=None)
    def test_every_text_is_in_one_group(self, texts: list[str]) -> None:
        found = groups(texts)
        assert sorted(place for group in found for place in group.members) == list(
            range(len(texts))
        )
        assert found == groups(texts)

    @pytest.mark.parametrize("common", [0.0, 1.0, 4.0])
    def test_embeddings_tell_what_is_alike_however_close_all_of_them_are(
        self, common: float
    ) -> None:
        """Many models put every text into one corner: unrelated ones may have a cosine of 0.9."""
        texts = REFUNDS + ORDERS + LOGINS
        found = groups(texts, embeddings([6, 40, 3], common=common))
        assert [len(group.members) for group in found] == [40, 6, 3]
        assert {"parcel", "courier"} & set(found[0].terms)

    @pytest.mark.parametrize("n", [1, 2, 3, 30])
    def test_embeddings_of_one_kind_are_one_group(self, n: int) -> None:
        assert len(groups(ORDERS[:n], embeddings([n], common=1.0))) == 1

    @given(
        st.lists(
            st.lists(st.floats(-1, 1), min_size=3, max_size=3) | st.just([0.0] * 3), max_size=12
        )
    )
    @settings(max_examples=60, deadline=None)
    def test_every_embedding_is_in_one_group(self, vectors: list[list[float]]) -> None:
        found = groups(["??"] * len(vectors), vectors)
        places = sorted(place for group in found for place in group.members)
        assert places == list(range(len(vectors)))
        assert found == groups(["??"] * len(vectors), vectors)

    def test_as_many_embeddings_as_are_ever_grouped_take_seconds(self) -> None:
        vectors = embeddings([MOST_GROUPED // 4] * 4, common=1.0)
        began_s = time.monotonic()
        assert len(groups(["words"] * MOST_GROUPED, vectors)) == 4
        assert time.monotonic() - began_s < 25

    def test_as_many_as_are_ever_grouped_take_seconds(self) -> None:
        texts = [
            f"topic{n % 37} detail{n % 11} number{n} and some words" for n in range(MOST_GROUPED)
        ]
        began_s = time.monotonic()
        groups(texts)
        assert time.monotonic() - began_s < 15
