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

import numpy as np
from numpy.typing import NDArray

from policies.measures import Bools, Floats

#: The share of labels that are slips, as far as anybody can tell beforehand.
SLIPS = 0.01

#: A label is suspect if it is a slip with this probability.
_DOUBT = 1 / 3

#: So large a share of the labels is suspect at most.
MOST = 0.05


def suspects(confidence: Floats, labels: Bools, settled: Bools) -> NDArray[np.intp]:
    """The labels to ask somebody else about, the most contradictory first.

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
    A label that is given with probability q at its confidence, slips included, is a slip with probability of about
    SLIPS / q, for a response that would have been labelled otherwise is mislabelled with probability SLIPS. It is
    suspect if that is a third or more: if q is 0.03 or less. Were no label a slip, no more than 3 % would be suspect
    by chance, and each of them confirmed.

    Examples
    --------
    >>> confidence, nobody = np.array([0.99, 0.99, 0.6, 0.01] * 10), np.zeros(40, dtype=bool)
    >>> suspects(confidence, np.array([True] * 37 + [False, False, True]), nobody).tolist()
    [39, 37]
    """
    given = np.where(labels, confidence, 1.0 - confidence)
    doubted = np.flatnonzero((given <= SLIPS / _DOUBT) & ~settled)
    worst = doubted[np.argsort(given[doubted], kind="stable")]
    return np.asarray(worst[: int(np.ceil(MOST * len(labels)))])
