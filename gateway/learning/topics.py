"""What texts are about, as far as their words tell: picking some that differ, and grouping those that are alike.

Everything here is deterministic: the same texts in the same order give the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import AgglomerativeClustering
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer

#: More texts than this are not compared with each other: it takes the square of their number.
MOST_GROUPED = 2000

#: Texts whose mean cosine distance is greater are of different groups.
_APART = 0.85
_TERMS = 4

#: Of groups by embeddings: no more than these are tried, and a mean silhouette of no more than this is no
#: substantial structure (Kaufman and Rousseeuw (1990), "Finding Groups in Data", chapter 2, table 4).
_MOST_CLUSTERS = 40
_CLEAR = 0.25


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


class Group(msgspec.Struct, frozen=True):
    """Texts that are alike: their places, the most typical first, and the words that tell them from the others."""

    members: tuple[int, ...]
    terms: tuple[str, ...]


def groups(texts: Sequence[str], vectors: Sequence[Sequence[float]] | None = None) -> list[Group]:
    """The texts in groups, the greatest first; every text is in one group. At most MOST_GROUPED texts.

    Average-linkage clustering, nothing drawn by lot: by the cosine of TF-IDF weights, cut at a fixed distance; or by the cosine of
    their `vectors`, if these are given (n by any dimension, finite), cut where the mean silhouette is greatest. How far apart
    unrelated texts are differs from one model of embeddings to the next, so there is no fixed distance for them; if no
    cut gives a silhouette above 0.25, they are one group.

    References
    ----------
    Rousseeuw (1987), "Silhouettes: a graphical aid to the interpretation and validation of cluster analysis".
    """
    if not texts:
        return []
    features, names = _weighed(texts)
    space = features if vectors is None else _unit(np.asarray(vectors, dtype=float))
    if space is None:
        # There is not one word in them.
        return [Group(tuple(range(len(texts))), ())]
    found = []
    for number in np.unique(assigned := _clusters(space) if vectors is None else _alike(space)):
        members = np.flatnonzero(assigned == number)
        centre = np.asarray(space[members].mean(axis=0)).ravel()
        likeness = np.asarray(space[members] @ centre).ravel()
        order = members[np.argsort(-likeness, kind="stable")]
        found.append(Group(tuple(map(int, order)), _terms(features, names, members)))
    return sorted(found, key=lambda group: (-len(group.members), min(group.members)))


def _weighed(texts: Sequence[str]) -> tuple[Any, Sequence[str]]:
    """TF-IDF weights, texts by terms, and the terms; None and none if there is not one word."""
    vectorise = TfidfVectorizer(
        sublinear_tf=True,
        stop_words="english",
        max_features=20_000,
        token_pattern=r"(?u)\b\w{2,30}\b",
    )
    try:
        return vectorise.fit_transform(texts), vectorise.get_feature_names_out()
    except ValueError:
        return None, ()


def _terms(features: Any, names: Sequence[str], members: Any) -> tuple[str, ...]:
    if features is None:
        return ()
    centre = np.asarray(features[members].mean(axis=0)).ravel()
    best = [each for each in np.argsort(-centre, kind="stable")[:_TERMS] if centre[each] > 0]
    return tuple(str(names[each]) for each in best)


def _unit(vectors: Any) -> Any:
    """The vectors at length 1; those of length 0 stay."""
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(length > 0, length, 1.0)


def _alike(space: Any) -> Any:
    """The number of each row's cluster, by the cut of the tree with the greatest mean silhouette; all 0 if none is clear."""
    n = len(space)
    if n < 3:
        return np.zeros(n, dtype=np.int64)
    distance = np.clip(1.0 - space @ space.T, 0.0, 2.0)
    np.fill_diagonal(distance, 0.0)
    tree = linkage(squareform(distance, checks=False), method="average")
    best, clearest = np.zeros(n, dtype=np.int64), _CLEAR
    for count in range(2, min(n, _MOST_CLUSTERS + 1)):
        labels = fcluster(tree, count, criterion="maxclust")
        if (found := _silhouette(distance, labels)) > clearest:
            best, clearest = labels, found
    return best


def _silhouette(distance: Any, labels: Any) -> float:
    """The mean over rows of (b - a) / max(a, b): a the mean distance to its own cluster, b to the nearest other; 0 if alone."""
    _, own = np.unique(labels, return_inverse=True)
    sizes = np.bincount(own)
    if len(sizes) < 2:
        return 0.0
    sums = distance @ np.eye(len(sizes))[own]
    rows = np.arange(len(own))
    inside = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / sizes
    means[rows, own] = np.inf
    outside = means.min(axis=1)
    widths = (outside - inside) / np.maximum(np.maximum(inside, outside), 1e-12)
    return float(np.where(sizes[own] > 1, widths, 0.0).mean())


def _clusters(features: Any) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    dense = np.asarray((features @ features.T).todense())
    if len(dense) < 2:
        return np.zeros(len(dense), dtype=np.int64)
    cluster = AgglomerativeClustering(
        n_clusters=None, metric="precomputed", linkage="average", distance_threshold=_APART
    )
    labels: np.ndarray[tuple[int], np.dtype[np.int64]] = cluster.fit_predict(1 - dense)
    return labels
