"""A very small language model that is real: it reads an order and writes it down as JSON, and errs in 15 of 100.

A decoder-only transformer of 0.3 million parameters with pre-norm, learned positions and exact GELU. Its confidence is too high,
because its logits are divided by 0.6: token probabilities mean something, but not what they say, as those of large models do.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from math import sqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec
import numpy as np
import zstandard
from numpy.typing import NDArray
from scipy.special import erf

Floats: TypeAlias = NDArray[np.floating[Any]]

_FOLDER = Path(__file__).parent
_WIDTH, _HEADS, _LAYERS, _CONTEXT = 96, 4, 3, 96
_BOS, _SEP, _EOS = 1, 2, 3
#: An answer has at most so many tokens; the rest of the context is for the prompt.
_ANSWER = 40
_SHARPNESS = 1 / 0.6
_EPSILON = np.float32(1e-5)
_HALF = np.float32(sqrt(0.5))
_SCALE = np.float32(sqrt(_HEADS / _WIDTH))


class Order(NamedTuple):
    """A message, and what is right to write down for it."""

    prompt: str
    gold: dict[str, Any]

    def is_right(self, answer: str) -> bool:
        """Whether an answer is JSON with the right value in every field, and with no other."""
        try:
            return bool(json.loads(answer) == self.gold)
        except json.JSONDecodeError:
            return False


def orders(kind: Literal["plain", "noisy"]) -> list[Order]:
    """The 4,000 plain orders, such as the model was made for, or the 1,500 noisy ones, which are harder."""
    packed = (_FOLDER / f"{kind}.jsonl.zst").read_bytes()
    lines = zstandard.ZstdDecompressor().decompress(packed).splitlines()
    return [Order(**json.loads(line)) for line in lines]


class Written(msgspec.Struct, frozen=True):
    """A token of an answer: its text, its log-probability, and the likeliest tokens at its place, likeliest first."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...]


class Model:
    """The model; it always writes what is likeliest (temperature 0)."""

    def __init__(self) -> None:
        self._words: list[str] = json.loads((_FOLDER / "vocab.json").read_text("utf-8"))
        self._ids = {word: number for number, word in enumerate(self._words)}
        with np.load(_FOLDER / "weights.npz") as packed:
            # Stored as [out, in]; applied as x @ [in, out].
            self._weights = {name: packed[name].astype(np.float32).T.copy() for name in packed}

    def answer(self, prompt: str, top: int) -> Iterator[Written]:
        """The tokens of the answer one by one, each with `top` alternatives; ends early if the context of 96 tokens is full.

        Words of the prompt that it does not know are passed over, as is what is too much of a prompt.
        """
        words = [self._ids[word] for word in prompt.split() if word in self._ids]
        tokens = [_BOS, *words[: _CONTEXT - _ANSWER - 2], _SEP]
        cache = _Cache()
        while cache.length + len(tokens) <= _CONTEXT:
            logprobs = self._next(tokens, cache)
            chosen = int(logprobs.argmax())
            if chosen == _EOS:
                return
            likeliest = np.argsort(-logprobs, kind="stable")[:top].tolist()
            yield Written(
                self._words[chosen],
                float(logprobs[chosen]),
                tuple((self._words[each], float(logprobs[each])) for each in likeliest),
            )
            tokens = [chosen]

    def _next(self, tokens: Sequence[int], cache: _Cache) -> Floats:
        """Read tokens; the log-probability of each word of the vocabulary to be the next."""
        w = self._weights
        x = w["e.weight"].T[tokens] + w["p.weight"].T[cache.length : cache.length + len(tokens)]
        for layer in range(_LAYERS):
            block = f"b.{layer}"
            qkv = self._linear(f"{block}.qkv", self._norm(f"{block}.l1", x))
            x = x + self._linear(f"{block}.o", cache.attend(layer, qkv))
            hidden = self._linear(f"{block}.f.0", self._norm(f"{block}.l2", x))
            x = x + self._linear(f"{block}.f.2", hidden * (erf(hidden * _HALF) + 1) * 0.5)
        cache.length += len(tokens)
        logits = self._linear("u", self._norm("n", x[-1])) * _SHARPNESS
        logits -= logits.max()
        logprobs: Floats = logits - np.log(np.exp(logits).sum())
        return logprobs

    def _linear(self, name: str, x: Floats) -> Floats:
        mapped: Floats = x @ self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        return mapped

    def _norm(self, name: str, x: Floats) -> Floats:
        centred = x - np.add.reduce(x, -1, keepdims=True) / _WIDTH
        variance: Floats = np.add.reduce(centred * centred, -1, keepdims=True) / _WIDTH
        scaled: Floats = centred / np.sqrt(variance + _EPSILON) * self._weights[f"{name}.weight"]
        shifted: Floats = scaled + self._weights[f"{name}.bias"]
        return shifted


class _Cache:
    """The keys and values of the `length` tokens read so far, by layer and head."""

    def __init__(self) -> None:
        self.length = 0
        self._seen = np.zeros((_LAYERS, 2, _HEADS, _CONTEXT, _WIDTH // _HEADS), np.float32)

    def attend(self, layer: int, qkv: Floats) -> Floats:
        """What n new tokens take from those before them, [n, 96], for their queries, keys and values, [n, 3 * 96]."""
        n, end = len(qkv), self.length + len(qkv)
        # To [3, heads, n, 96 / heads].
        q, *new = qkv.reshape(n, 3, _HEADS, -1).transpose(1, 2, 0, 3)
        self._seen[layer, :, :, self.length : end] = new
        keys, values = self._seen[layer, :, :, :end]
        scores = q @ keys.swapaxes(1, 2) * _SCALE
        if n > 1:
            scores += np.triu(np.full((n, end), -np.inf, np.float32), self.length + 1)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= np.add.reduce(weights, -1, keepdims=True)
        taken: Floats = (weights @ values).swapaxes(0, 1).reshape(n, _WIDTH)
        return taken
