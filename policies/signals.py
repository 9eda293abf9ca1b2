"""What the token log-probabilities of a response say of it, as named numbers.

Logprobs measure how certain the model was of its tokens, not whether they are true: nothing here is
a confidence. That is what `policies.calibration` makes of a score, from labels.

===================  ================================================================  ==========
signal               formula, with ``l_t`` the natural-log probability of token ``t``  range
===================  ================================================================  ==========
``n_tokens``         ``n``                                                             1, 2, ...
``total_logprob``    ``sum l_t``: log-probability of the whole sequence                nats, <= 0
``mean_logprob``     ``total / n``: ``exp(-mean)`` is the perplexity                   nats, <= 0
``min_logprob``      ``min l_t``: the least certain token                              nats, <= 0
``p10_logprob``      nearest-rank 10th percentile of ``l_t``                           nats, <= 0
``window_logprob``   lowest mean of 8 tokens in a row; the mean, if there are fewer    nats, <= 0
``first_logprob``    ``l_1``; says nothing where the first token is scaffold (``{``)   nats, <= 0
``unsure_tokens``    how many tokens have a probability below 0.9                      0, 1, ...
``answer_logprob``   ``sum l_t`` over the tokens that wrote the answer                 nats, <= 0
``mean_margin``      mean over ``t`` of best minus second-best alternative             nats, >= 0
``min_margin``       the smallest of these margins                                     nats, >= 0
``answer_margin``    the smallest over the tokens that wrote the answer                nats, >= 0
``mean_entropy``     mean over ``t`` of ``-sum p ln p`` over the listed alternatives   nats, >= 0
``unlisted_mass``    mean over ``t`` of ``1 - sum p`` over the listed alternatives     [0, 1]
===================  ================================================================  ==========

The last five need the alternatives (`top_logprobs`, at least two at every position) and are left out
without them. The entropy is a lower bound: mass that is not listed is not counted. What the answer is
(`policies.answer`) is told from the text: the values of JSON or of tool calls, a letter, the last
number, the final line. Where the tokens do not add up to the text there are no signals of it.

The score of a judge, in [0, 1], is a signal as well: ``judge.<check id>``.

References
----------
Length-normalised sequence probability: Malinin and Gales (2021), "Uncertainty Estimation in
Autoregressive Structured Prediction". Least certain token and token entropy: Manakul et al. (2023),
"SelfCheckGPT". Margin: Scheffer et al. (2001), "Active Hidden Markov Models for Information
Extraction". Worst window: Fu et al. (2025), "Deep Think with Confidence" (lowest group confidence;
there over windows of long reasoning).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from heapq import nsmallest
from itertools import accumulate, islice, pairwise
from math import exp, isnan, log, log1p, prod
from operator import ge, mul, sub
from typing import Annotated, Literal, TypeAlias, get_args

import msgspec
from pydantic import Field

from policies.answer import answer_tokens, named_values
from validators import Choice, Exchange, TokenLogprob

LogprobName: TypeAlias = Literal[
    "total_logprob",
    "mean_logprob",
    "min_logprob",
    "p10_logprob",
    "window_logprob",
    "first_logprob",
    "answer_logprob",
]
SignalName: TypeAlias = Literal[
    "total_logprob",
    "mean_logprob",
    "min_logprob",
    "p10_logprob",
    "window_logprob",
    "first_logprob",
    "answer_logprob",
    "n_tokens",
    "unsure_tokens",
    "mean_margin",
    "min_margin",
    "answer_margin",
    "mean_entropy",
    "unlisted_mass",
]

#: What every response with usable logprobs has; one recorded by an earlier version may lack some.
ALWAYS: frozenset[str] = frozenset(
    {
        "total_logprob",
        "mean_logprob",
        "min_logprob",
        "p10_logprob",
        "window_logprob",
        "first_logprob",
        "n_tokens",
        "unsure_tokens",
    }
)

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

#: How many tokens in a row `window_logprob` takes: a phrase or a few digits.
WINDOW_TOKENS = 8

#: At most so many values of a response are told of, the least likely ones.
MAX_FIELDS = 20

_UNSURE = log(0.9)

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


class Signals(msgspec.Struct, frozen=True):
    """The signals by name, every one finite; empty exactly when `absent` says why."""

    values: Mapping[str, float] = msgspec.field(default_factory=dict)
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
    found = [token_signals(choice.logprobs, answer_tokens(choice)) for choice in exchange.choices]
    for each in found:
        if each.absent:
            return each
    return min(
        found, key=lambda each: each.values["mean_logprob"], default=Signals(absent=Absence.ABSENT)
    )


def token_signals(tokens: Sequence[TokenLogprob] | None, answer: Sequence[int] = ()) -> Signals:
    """The signals of a run of tokens: a whole choice, or any slice of one.

    `answer` are the numbers of those that wrote the answer; without any there are no signals of it.
    """
    if not tokens:
        return Signals(absent=Absence.ABSENT)
    logprobs = [value for token in tokens if (value := token.logprob) is not None]
    if len(logprobs) < len(tokens):
        return Signals(absent=Absence.PARTIAL if logprobs else Absence.NULL)
    ordered = sorted(logprobs)
    if isnan(sum(logprobs)) or ordered[-1] > ROUNDING:
        return Signals(absent=Absence.MALFORMED)
    if _is_constant(logprobs, tokens):
        return Signals(absent=Absence.CONSTANT)
    if ordered[0] < FLOOR or ordered[-1] > 0.0:
        logprobs = [min(max(each, FLOOR), 0.0) for each in logprobs]
        ordered = sorted(logprobs)
    return Signals(_sequence(logprobs, ordered, answer) | _alternatives(tokens, answer))


class FieldSignal(msgspec.Struct, frozen=True):
    """How likely the tokens were that wrote one value of a JSON answer, by the model's own word.

    This is a signal and no confidence that the value is right. `path` names the value as a `Finding`
    does (`choices[0].message.content#/items/0/price`). `token_probability` in [0, 1] is the product
    over its `n_tokens` tokens, `least_probability` the smallest factor: of two values of different
    length the longer one has, as a rule, the smaller product. A token that wrote more than the value
    counts whole.
    """

    path: str
    token_probability: float
    least_probability: float
    n_tokens: int


def field_signals(exchange: Exchange) -> tuple[FieldSignal, ...]:
    """The values of JSON texts and tool calls that are least likely, at most MAX_FIELDS, the least likely first.

    Left out is a value that cannot be located, or one of whose tokens has no log-probability. There
    are none of a choice whose logprobs carry no information (`Absence.CONSTANT`).
    """
    found = (each for choice in exchange.choices for each in _fields(choice))
    return tuple(nsmallest(MAX_FIELDS, found, key=lambda each: each.token_probability))


def _fields(choice: Choice) -> Iterator[FieldSignal]:
    tokens = choice.logprobs or ()
    logprobs = [token.logprob for token in tokens]
    if _is_constant([each for each in logprobs if each is not None], tokens):
        return
    for path, (first, last) in named_values(choice):
        own = [each for each in logprobs[first:last] if each is not None and each <= ROUNDING]
        if own and len(own) == last - first:
            factors = [exp(min(each, 0.0)) for each in own]
            yield FieldSignal(path, prod(factors), min(factors), last - first)


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

    Logprobs become the clipped log-odds of their exponential, a judge's score its log-odds, clipped
    sooner; a margin, already a log-odds between two tokens, is capped where those end; entropy and
    unlisted mass become their negative logarithm, a count of unsure tokens that of one more, and
    length its logarithm.
    """
    return scale_of(name)(value)


def scale_of(name: str) -> Callable[[float], float]:
    """How a signal of this name is scaled: what `feature` does with its value."""
    if name in _LOGPROBS:
        return _exp_log_odds
    if name.startswith(JUDGE):
        return _said_log_odds
    return _OTHER_SCALES.get(name, _capped)


def _exp_log_odds(value: float) -> float:
    return log_odds(exp(value))


def _said_log_odds(value: float) -> float:
    return log_odds(min(max(value, SAID_CLIP), 1.0 - SAID_CLIP))


def _log_length(value: float) -> float:
    return log(max(value, 1.0))


def _neg_log_count(value: float) -> float:
    return -log1p(value)


def _neg_log(value: float) -> float:
    return -log(value + CLIP)


def _capped(value: float) -> float:
    return min(value, -log(CLIP))


_LOGPROBS = frozenset(get_args(LogprobName))
_OTHER_SCALES = {
    "n_tokens": _log_length,
    "unsure_tokens": _neg_log_count,
    "mean_entropy": _neg_log,
    "unlisted_mass": _neg_log,
}


def _sequence(
    logprobs: list[float], ordered: list[float], answer: Sequence[int]
) -> dict[str, float]:
    n = len(logprobs)
    sums = [0.0, *accumulate(logprobs)]
    total = sums[-1]
    values = {
        "n_tokens": float(n),
        "total_logprob": total,
        "mean_logprob": total / n,
        "min_logprob": ordered[0],
        "p10_logprob": ordered[(n + 9) // 10 - 1],
        "window_logprob": _worst_window(sums) if n > WINDOW_TOKENS else total / n,
        "first_logprob": logprobs[0],
        "unsure_tokens": float(bisect_left(ordered, _UNSURE)),
    }
    if answer:
        values["answer_logprob"] = sum([logprobs[each] for each in answer])
    return values


def _worst_window(sums: list[float]) -> float:
    # A difference of sums may be off by their rounding, and above 0.
    lowest: float = min(map(sub, sums[WINDOW_TOKENS:], sums))
    return min(0.0, lowest / WINDOW_TOKENS)


def _alternatives(tokens: Sequence[TokenLogprob], answer: Sequence[int]) -> dict[str, float]:
    positions = [token.top_logprobs or () for token in tokens]
    sizes = list(map(len, positions))
    if min(sizes) < 2:
        return {}
    flat = [
        value for position in positions for each in position if (value := each.logprob) is not None
    ]
    if len(flat) < sum(sizes) or isnan(sum(flat)):
        return {}
    best, second, lowest = _ranked(flat, sizes)
    if max(best) > ROUNDING:
        return {}
    if lowest < FLOOR:
        flat = [max(each, FLOOR) for each in flat]
        best, second, _ = _ranked(flat, sizes)
    margins = list(map(sub, best, second))
    probabilities = list(map(exp, flat))
    n = len(sizes)
    values = {
        "mean_margin": sum(margins) / n,
        "min_margin": min(margins),
        "mean_entropy": max(0.0, -sum(map(mul, probabilities, flat)) / n),
        "unlisted_mass": max(0.0, 1.0 - sum(probabilities) / n),
    }
    if answer:
        values["answer_margin"] = min([margins[each] for each in answer])
    return values


def _ranked(flat: list[float], sizes: list[int]) -> tuple[list[float], list[float], float]:
    """The best and the second-best alternative at each position, and the worst of all."""
    # Most servers list the likeliest first; vLLM puts the sampled token there, likely or not.
    width = sizes[0]
    if sizes.count(width) == len(sizes):
        columns = [flat[start::width] for start in range(width)]
        if all(all(map(ge, likelier, other)) for likelier, other in pairwise(columns)):
            return columns[0], columns[1], min(columns[-1])
    rest = iter(flat)
    ranked = [sorted(islice(rest, size), reverse=True) for size in sizes]
    return [row[0] for row in ranked], [row[1] for row in ranked], min(flat)


def _is_constant(logprobs: Sequence[float], tokens: Sequence[TokenLogprob]) -> bool:
    n = len(logprobs)
    if n < CONSTANT_TOKENS or sum(logprobs) <= CONSTANT_MEAN * n:
        return False
    return not any(
        sum(each.logprob is not None and each.logprob > FLOOR for each in token.top_logprobs or ())
        > 1
        for token in tokens
    )
