"""Labels to ask somebody else about: few, symmetric, and enough to survive slips."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from benchmarks.slips import answers, cases
from policies.certification import certify
from policies.labelled import Labelled
from policies.suspects import MOST, SLIPS, doubtful, suspected, told

rows = st.lists(
    st.tuples(st.floats(0, 1), st.booleans(), st.booleans()), min_size=1, max_size=200
).map(lambda each: tuple(np.array(column) for column in zip(*each, strict=True)))


@given(rows)
def test_suspects_are_few_contradict_the_rest_and_are_not_settled(
    some: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    confidence, labels, settled = some
    found = doubtful(confidence, labels, settled)
    given_with = np.where(labels, confidence, 1 - confidence)
    assert len(found) <= np.ceil(MOST * len(labels))
    assert (given_with[found] <= 3 * SLIPS).all()
    assert not settled[found].any()
    assert (np.diff(given_with[found]) >= 0).all()


@given(rows)
def test_errors_and_approvals_are_looked_at_alike(
    some: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    confidence, labels, settled = some
    exact = np.round(confidence * 64) / 64
    found = doubtful(exact, labels, settled)
    assert found.tolist() == doubtful(1 - exact, ~labels, settled).tolist()


def test_of_labels_without_slips_few_are_suspect() -> None:
    draw = np.random.default_rng(1)
    confidence = draw.beta(4, 0.2, 20_000)
    labels = draw.random(20_000) < confidence
    assert len(doubtful(confidence, labels, np.zeros(20_000, dtype=bool))) < 0.03 * 20_000


def a_row(number: int, acceptable: bool = True, **changes: Any) -> Labelled:
    return replace(Labelled(f"hgd_{number}", acceptable, {}), **changes)


def test_what_is_suspect_is_named_and_what_no_threshold_rests_on_is_not() -> None:
    labelled = [a_row(n) for n in range(120)]
    labelled[3] = a_row(3, acceptable=False)
    labelled[4] = a_row(4, acceptable=False, weight=0.5)
    labelled[5] = a_row(5, acceptable=False, settled=True)
    labelled[6] = a_row(6)
    confidence = np.full(120, 0.99)
    confidence[6] = 0.001
    found = suspected(labelled, confidence)
    assert [(each.id, each.acceptable) for each in found] == [("hgd_6", True), ("hgd_3", False)]
    (said,) = told(found)
    assert said.startswith(
        "2 labels contradict all the others where they stand, 1 of them as errors (hgd_6, hgd_3)"
    )
    assert told(()) == []


def returned(
    mean: float, spread: float, n: int, alpha: float, seeds: range
) -> dict[str, list[tuple[float, float]]]:
    """By how labels are: the share returned and the share of errors among it, as the truth has it."""
    scores, chance = answers(np.random.default_rng(99), mean, spread, 50_000)
    found: dict[str, list[tuple[float, float]]] = {}
    for seed in seeds:
        for kind, some, labels, _ in cases(mean, spread, n, seed):
            parts = some[n // 5 :], labels[n // 5 :], some[: n // 5], labels[: n // 5]
            threshold = certify(*parts, alpha=alpha, delta=0.05).threshold
            above = scores >= (2.0 if threshold is None else threshold)
            errors = float(1 - chance[above].mean()) if above.any() else 0.0
            found.setdefault(kind, []).append((float(above.mean()), errors))
    return found


def test_one_slip_in_a_hundred_is_survived() -> None:
    """At 2 % it takes nearly all that could be returned; second opinions bring most of it back."""
    found = returned(4.0, 2.0, 1600, 0.02, range(8))
    share = {kind: float(np.mean([each for each, _ in some])) for kind, some in found.items()}
    assert share["slips"] < 0.3 * share["clean"]
    assert share["second opinions"] > 0.65 * share["clean"]


def test_second_opinions_break_no_promise() -> None:
    """Of 40 certificates more than 5 broken would be a chance of 1 in 70 at a true rate of 5 %."""
    found = returned(3.0, 2.5, 900, 0.05, range(40))
    assert sum(errors > 0.05 for _, errors in found["second opinions"]) <= 5
