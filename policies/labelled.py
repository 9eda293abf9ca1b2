"""What is known of a response that was judged: all that a calibrator can be fitted to."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

import msgspec

from policies.model import RiskTier


class Labelled(msgspec.Struct, frozen=True):
    """A response that was judged: what was recorded of it, and whether it was acceptable as it was.

    `id` is that of the decision, or what the file of labels says. `signals` are as recorded
    (`policies.signals`, and ``judge.<check id>``), every one finite; `check_scores` those of checks
    with `on_fail: score`, in [0, 1]. `inclusion` in (0, 1] is the probability with which the
    response came to be labelled, `weight` in (0, 1] the trust in the label. `blind` says that
    whoever judged it saw neither confidence nor verdict, `settled` that two people agree on it, and
    more than say otherwise. `digest` is of the content: equal for duplicates, empty where it is not
    known.

    Raises
    ------
    ValueError
        If `inclusion` or `weight` is not in (0, 1].
    """

    id: str
    acceptable: bool
    signals: Mapping[str, float]
    check_scores: tuple[float, ...] = ()
    model: str = ""
    task: str | None = None
    tier: RiskTier | None = None
    inclusion: float = 1.0
    weight: float = 1.0
    blind: bool = False
    at: datetime | None = None
    digest: str = ""
    settled: bool = False

    def __post_init__(self) -> None:
        for name, value in (("inclusion", self.inclusion), ("weight", self.weight)):
            if not 0.0 < value <= 1.0:
                raise ValueError(f"label {self.id}: {name} {value} is not in (0, 1]")
