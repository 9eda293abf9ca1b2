"""What texts are about, as far as their words tell: picking some that differ, and grouping those that are alike.

Everything here is deterministic: the same texts in the same order give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.cluster import AgglomerativeClustering
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer

#: More texts than this are not compared with each other: it takes the square of their number.
MOST_GROUPED = 2000

#: Texts whose mean cosine distance is greater are of different groups.
_APART = 0.85
_TERMS = 4


def pick(texts: Sequence[str], weights: Sequence[float], count: int) -> list[int]:
    """Places of at most `count` texts that weigh much and differ from each other, in the order they were picked.

    Greedy weighted k-centre: the first weighs most; each next has the greatest product of its weight and its distance (one less
    the cosine of hashed counts of words and their pairs) to the nearest that was picked. A text that says what a picked one says is
    never picked: its distance is 0.

    Parameters
    ----------
    texts : sequence of str, length n
    weights : sequence of float, length n, each > 0
    count : int, >= 0

    References
    ----------
    Sener and Savarese (2018), "Active Learning for Convolutional Neural Networks: A Core-Set Approach", algorithm 1 (greedy
    k-centre); the weight by uncertainty follows Ash et al. (2020), "Deep Batch Active Learning by Diverse, Uncertain Gradient
    Lower Bounds", section 3, in which both count at once.
    """
    if not texts or count <= 0:
        return []
    vectorise = HashingVectorizer(n_features=2**16, ngram_range=(1, 2), alternate_sign=False)
    features = vectorise.transform(texts)
    weighed = np.asarray(weights, dtype=float)
    distance = np.ones(len(texts))
    picked: list[int] = []
    while len(picked) < min(count, len(texts)):
        gain = weighed * distance
        best = int(np.argmax(gain))
        if gain[best] <= 1e-9:
            break
        picked.append(best)
        cosine = np.asarray((features @ features[best].T).todense()).ravel()
        distance = np.minimum(distance, np.clip(1 - cosine, 0, 1))
        distance[best] = 0.0
    return picked


@dataclass(frozen=True, slots=True)
class Group:
    """Texts that are alike: their places, the most typical first, and the words that tell them from the others."""

    members: tuple[int, ...]
    terms: tuple[str, ...]


def groups(texts: Sequence[str]) -> list[Group]:
    """The texts in groups, the greatest first; every text is in one group. At most MOST_GROUPED texts.

    Average-linkage clustering by the cosine of TF-IDF weights, cut at a fixed distance; nothing is drawn by lot.
    """
    if not texts:
        return []
    vectorise = TfidfVectorizer(
        sublinear_tf=True,
        stop_words="english",
        max_features=20_000,
        token_pattern=r"(?u)\b\w{2,30}\b",
    )
    try:
        features = vectorise.fit_transform(texts)
    except ValueError:
        # There is not one word in them.
        return [Group(tuple(range(len(texts))), ())]
    names = vectorise.get_feature_names_out()
    found = []
    for number in np.unique(assigned := _clusters(features)):
        members = np.flatnonzero(assigned == number)
        centre = np.asarray(features[members].mean(axis=0)).ravel()
        likeness = np.asarray(features[members] @ centre).ravel()
        order = members[np.argsort(-likeness, kind="stable")]
        best = [each for each in np.argsort(-centre, kind="stable")[:_TERMS] if centre[each] > 0]
        found.append(Group(tuple(map(int, order)), tuple(str(names[each]) for each in best)))
    return sorted(found, key=lambda group: (-len(group.members), min(group.members)))


def _clusters(features: Any) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    dense = np.asarray((features @ features.T).todense())
    if len(dense) < 2:
        return np.zeros(len(dense), dtype=np.int64)
    cluster = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=_APART
    )
    labels: np.ndarray[tuple[int], np.dtype[np.int64]] = cluster.fit_predict(1 - dense)
    return labels
