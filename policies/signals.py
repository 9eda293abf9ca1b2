"""What the token log-probabilities of a response say of it, as named numbers.

Logprobs measure how certain the model was of its tokens, not whether they are true: nothing here is
a confidence. That is what `policies.calibration` makes of a score, from labels.

=================  ================================================================  ==========
signal             formula, with ``l_t`` the natural-log probability of token ``t``  range
=================  ================================================================  ==========
``n_tokens``       ``n``                                                             1, 2, ...
``total_logprob``  ``sum l_t``: log-probability of the whole sequence                nats, <= 0
``mean_logprob``   ``total / n``: ``exp(-mean)`` is the perplexity                   nats, <= 0
``min_logprob``    ``min l_t``: the least certain token                              nats, <= 0
``p10_logprob``    nearest-rank 10th percentile of ``l_t``                           nats, <= 0
``first_logprob``  ``l_1``; says nothing where the first token is scaffold (``{``)   nats, <= 0
``mean_margin``    mean over ``t`` of best minus second-best alternative             nats, >= 0
``min_margin``     the smallest of these margins                                     nats, >= 0
``mean_entropy``   mean over ``t`` of ``-sum p ln p`` over the listed alternatives   nats, >= 0
=================  ================================================================  ==========

The last three need the alternatives (`top_logprobs`, at least two at every position) and are left
out without them. The entropy is a lower bound: mass that is not listed is not counted.

The score of a judge, in [0, 1], is a signal as well: ``judge.<check id>``.

References
----------
Length-normalised sequence probability: Malinin and Gales (2021), "Uncertainty Estimation in
Autoregressive Structured Prediction". Least certain token and token entropy: Manakul et al. (2023),
"SelfCheckGPT". Margin: Scheffer et al. (2001), "Active Hidden Markov Models for Information
Extraction".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import islice, pairwise
from math import exp, isnan, log
from operator import ge, sub
from typing import Annotated, Literal, TypeAlias, get_args

from pydantic import Field

from validators import Exchange, TokenLogprob

LogprobName: TypeAlias = Literal[
    "total_logprob", "mean_logprob", "min_logprob", "p10_logprob", "first_logprob"
]
SignalName: TypeAlias = Literal[
    "total_logprob",
    "mean_logprob",
    "min_logprob",
    "p10_logprob",
    "first_logprob",
    "n_tokens",
    "mean_margin",
    "min_margin",
    "mean_entropy",
]

#: The score of the judge of that id.
JudgeSignal: TypeAlias = Annotated[str, Field(pattern=r"^judge\.[a-z][a-z0-9_]{0,63}$")]
JUDGE = "judge."

#: Lower log-probabilities count as this: providers write -9999.0 (OpenAI API) or -inf for "not
#: among the likely ones".
FLOOR = -100.0

#: A log-probability is never positive; rounding may make it so by less than this, which counts as
#: 0.
ROUNDING = 1e-3

#: Scores are clipped to [CLIP, 1 - CLIP] before their log-odds are taken. Answers beyond tie, and the
#: surest are what thresholds are about: at 1e-5 more than 40 % of the answers of some models tied.
CLIP = 1e-9

#: What a judge says is clipped to [SAID_CLIP, 1 - SAID_CLIP]: many say 1 of everything they like, which
#: would count for as much as nine zeros of a model's own tokens.
SAID_CLIP = 1e-3

#: What a provider that always says "certain" looks like; see `Absence.CONSTANT`.
CONSTANT_TOKENS = 32
CONSTANT_MEAN = -1e-6


class Absence(StrEnum):
    """Why a response has no usable logprobs; recorded, and never mixed with the others.

    A short answer may be certain of every token: among 4,000 labelled answers of 20 to 30 tokens,
    700 have a mean above -1e-6, and 99.4 % of these are right (of all: 85 %). So `CONSTANT` needs
    at least CONSTANT_TOKENS tokens whose mean is above CONSTANT_MEAN, and no position at which a
    second candidate has any probability. DeepSeek's recorded values are like this over a hundred
    tokens of reasoning, with an AUROC of .50.
    """

    ABSENT = "absent"
    """The provider sent none, or there are no tokens (a bare tool call)."""
    NULL = "null"
    """Every token's logprob is null."""
    PARTIAL = "partial"
    """Some tokens' logprobs are null."""
    CONSTANT = "constant"
    """All are about 0, with no alternatives: the values carry no information."""
    MALFORMED = "malformed"
    """A value is NaN or above 0: not a log-probability."""


@dataclass(frozen=True, slots=True)
class Signals:
    """The signals by name, every one finite; empty exactly when `absent` says why."""

    values: Mapping[str, float] = field(default_factory=dict)
    absent: Absence | None = None


def signals(exchange: Exchange) -> Signals:
    """The signals of a response; with several choices, those of the least certain one.

    The least certain is the one with the lowest `mean_logprob`. A response is known no better than
    its least known choice: if any choice lacks usable logprobs, so does the response.

    Examples
    --------
    >>> from validators import Choice, TokenLogprob
    >>> choice = Choice("choices[0]", logprobs=[TokenLogprob(-0.1), TokenLogprob(-0.3)])
    >>> signals(Exchange("chat", {}, (choice,))).values["mean_logprob"]
    -0.2
    """
    found = [token_signals(choice.logprobs) for choice in exchange.choices]
    for each in found:
        if each.absent:
            return each
    return min(
        found, key=lambda each: each.values["mean_logprob"], default=Signals(absent=Absence.ABSENT)
    )


def token_signals(tokens: Sequence[TokenLogprob] | None) -> Signals:
    """The signals of a run of tokens: a whole choice, or any slice of one."""
    if not tokens:
        return Signals(absent=Absence.ABSENT)
    logprobs = [value for token in tokens if (value := token.logprob) is not None]
    if len(logprobs) < len(tokens):
        return Signals(absent=Absence.PARTIAL if logprobs else Absence.NULL)
    if isnan(sum(logprobs)) or max(logprobs) > ROUNDING:
        return Signals(absent=Absence.MALFORMED)
    values = _sequence(logprobs)
    if _is_constant(values, tokens):
        return Signals(absent=Absence.CONSTANT)
    return Signals(values | _alternatives(tokens))


def score(values: Mapping[str, float], check_scores: Iterable[float] = ()) -> float | None:
    """The default score in [0, 1]: ``exp(mean_logprob)``, the geometric mean token probability.

    Scores of checks with `on_fail: score` can only lower it: the minimum is taken, so that a check
    that passes (1) changes nothing and the order of checks does not matter. Without logprobs there
    is no score (None), whatever checks say: their scores alone would be another scale.

    Examples
    --------
    >>> score({"mean_logprob": 0.0}, [0.4, 1.0])
    0.4
    """
    mean = values.get("mean_logprob")
    return None if mean is None else min(exp(mean), *check_scores, 1.0)


def log_odds(probability: float) -> float:
    """``ln(p / (1 - p))``, with p clipped to [CLIP, 1 - CLIP] so that it is finite.

    Examples
    --------
    >>> log_odds(0.5)
    0.0
    """
    if probability < CLIP:
        probability = CLIP
    elif probability > 1.0 - CLIP:
        probability = 1.0 - CLIP
    return log(probability / (1.0 - probability))


def feature(name: str, value: float) -> float:
    """A signal on the scale on which signals are combined linearly; always finite.

    Logprobs become the clipped log-odds of their exponential, a judge's score its log-odds, clipped sooner;
    a margin, already a log-odds between two tokens, is capped where those end; entropy becomes its
    negative logarithm and length its logarithm.
    """
    return scale_of(name)(value)


def scale_of(name: str) -> Callable[[float], float]:
    """How a signal of this name is scaled: what `feature` does with its value."""
    if name in _LOGPROBS:
        return _exp_log_odds
    if name.startswith(JUDGE):
        return _said_log_odds
    return {"n_tokens": _log_length, "mean_entropy": _neg_log}.get(name, _capped)


def _exp_log_odds(value: float) -> float:
    return log_odds(exp(value))


def _said_log_odds(value: float) -> float:
    return log_odds(min(max(value, SAID_CLIP), 1.0 - SAID_CLIP))


def _log_length(value: float) -> float:
    return log(max(value, 1.0))


def _neg_log(value: float) -> float:
    return -log(value + CLIP)


def _capped(value: float) -> float:
    return min(value, -log(CLIP))


_LOGPROBS = frozenset(get_args(LogprobName))


def _sequence(logprobs: list[float]) -> dict[str, float]:
    ordered = sorted(logprobs)
    if ordered[0] < FLOOR or ordered[-1] > 0.0:
        logprobs = [min(max(each, FLOOR), 0.0) for each in logprobs]
        ordered = sorted(logprobs)
    n = len(logprobs)
    total = sum(logprobs)
    return {
        "n_tokens": float(n),
        "total_logprob": total,
        "mean_logprob": total / n,
        "min_logprob": ordered[0],
        "p10_logprob": ordered[(n + 9) // 10 - 1],
        "first_logprob": logprobs[0],
    }


def _alternatives(tokens: Sequence[TokenLogprob]) -> dict[str, float]:
    positions = [token.top_logprobs or () for token in tokens]
    sizes = [len(position) for position in positions]
    if min(sizes) < 2:
        return {}
    flat = [
        value for position in positions for each in position if (value := each.logprob) is not None
    ]
    if len(flat) < sum(sizes) or isnan(sum(flat)) or max(flat) > ROUNDING:
        return {}
    if min(flat) < FLOOR:
        flat = [max(each, FLOOR) for each in flat]
    margins = _margins(flat, sizes)
    return {
        "mean_margin": sum(margins) / len(margins),
        "min_margin": min(margins),
        "mean_entropy": max(0.0, -sum([exp(each) * each for each in flat]) / len(sizes)),
    }


def _margins(flat: list[float], sizes: list[int]) -> list[float]:
    # Most servers list the likeliest first; vLLM puts the sampled token there, likely or not.
    width = sizes[0]
    if sizes.count(width) == len(sizes):
        columns = [flat[start::width] for start in range(width)]
        if all(all(map(ge, likelier, other)) for likelier, other in pairwise(columns)):
            return list(map(sub, columns[0], columns[1]))
    rest = iter(flat)
    ranked = [sorted(islice(rest, size), reverse=True) for size in sizes]
    return [likeliest - second for likeliest, second, *_ in ranked]


def _is_constant(values: Mapping[str, float], tokens: Sequence[TokenLogprob]) -> bool:
    if values["n_tokens"] < CONSTANT_TOKENS or values["mean_logprob"] <= CONSTANT_MEAN:
        return False
    return not any(
        sum(each.logprob is not None and each.logprob > FLOOR for each in token.top_logprobs or ())
        > 1
        for token in tokens
    )
