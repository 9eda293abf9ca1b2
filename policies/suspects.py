"""Labels that contradict all the others: which of them a second person should look at before a threshold rests on them.

One wrong label among the surest responses costs a threshold more than a hundred elsewhere: an error there that is none
keeps a promise from being made that could be kept. So it is worth asking again, but only where a slip of the labeller is
about as likely an explanation as the response is.

What the second person says takes nothing away: a label is overruled when two people say otherwise (a third where two differ), and
until then it counts as it is. So a suspect error is an error for every certificate, which is then more careful than it
need be, never less. Errors are not looked at again because they are errors, but because of where they are, and approvals
where nearly nothing is acceptable as well. What remains: of the true errors that a first labeller let pass nobody asks, so
with a share s of slips a promise of alpha holds for the errors that labellers see, alpha / (1 - s) of all.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
from numpy.typing import NDArray

from policies.labelled import Labelled
from policies.measures import Bools, Floats

#: The share of labels that are slips, as far as anybody can tell beforehand.
SLIPS = 0.01

#: A label is suspect if it is a slip with this probability.
_DOUBT = 1 / 3

#: So large a share of the labels is suspect at most.
MOST = 0.05

_NAMED = 5


class Suspect(msgspec.Struct, frozen=True):
    """A label that somebody else should look at, and the confidence that a map has in its response which was fitted without it."""

    id: str
    acceptable: bool
    confidence: float


def suspected(rows: Sequence[Labelled], confidence: Floats) -> tuple[Suspect, ...]:
    """The suspect ones of labelled responses, the most contradictory first; `confidence` as `doubtful` takes it.

    Labels of less than full trust are none: no threshold rests on them.
    """
    trusted = [at for at, row in enumerate(rows) if row.weight == 1.0]
    labels = np.array([rows[at].acceptable for at in trusted], dtype=bool)
    settled = np.array([rows[at].settled for at in trusted], dtype=bool)
    return tuple(
        Suspect(rows[trusted[i]].id, rows[trusted[i]].acceptable, float(confidence[trusted[i]]))
        for i in doubtful(confidence[trusted], labels, settled)
    )


def doubtful(confidence: Floats, labels: Bools, settled: Bools) -> NDArray[np.intp]:
    """Which labels to ask somebody else about, the most contradictory first.

    Parameters
    ----------
    confidence : n probabilities that the label is True, fitted to labels without this one
    labels : n labels; True means acceptable
    settled : n; True where two people agree on the label already

    Returns
    -------
    indices
        At most MOST of the n, none of them settled.

    Notes
    -----
    Suppose the labeller slips with probability SLIPS. A label that is given with probability q at its confidence, slips
    included, is then a slip with a probability of about SLIPS / q. It is suspect if that is a third or more: if q is 0.03
    or less. So of labels without any slip no more than 3 % are suspect on average, and all of those are confirmed.

    Examples
    --------
    >>> confidence, nobody = np.array([0.99, 0.98, 0.6, 0.01] * 10), np.zeros(40, dtype=bool)
    >>> doubtful(confidence, np.array([True, True, True, False] * 9 + [False] * 4), nobody).tolist()
    [36, 37]
    """
    given = np.where(labels, confidence, 1.0 - confidence)
    doubted = np.flatnonzero((given <= SLIPS / _DOUBT) & ~settled)
    worst = doubted[np.argsort(given[doubted], kind="stable")]
    return np.asarray(worst[: int(np.ceil(MOST * len(labels)))])


def told(suspects: Sequence[Suspect]) -> list[str]:
    """What there is to say of them, as remarks on the labels."""
    if not suspects:
        return []
    named = ", ".join(each.id for each in suspects[:_NAMED])
    more = f" and {len(suspects) - _NAMED} more" if suspects[_NAMED:] else ""
    errors = sum(not each.acceptable for each in suspects)
    return [
        f"{len(suspects)} labels contradict all the others where they stand, {errors} of them as errors ({named}{more}): one "
        "in three such or more is a slip of whoever gave it; until two people agree, each counts as it is"
    ]
