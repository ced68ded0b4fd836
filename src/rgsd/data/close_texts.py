"""Find pairs of texts that share nearly all of their word trigrams, or a long passage.

The search is exact. An inverted index finds the candidates: close texts share at least one of the shorter text's rarest
trigrams (prefix filtering: Bayardo et al., "Scaling up all pairs similarity search", WWW 2007).

Letters in names: N texts, G distinct trigrams, E pairs of a text and one of its trigrams, in the order of the texts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

MIN_JACCARD = 0.9
"""Least Jaccard similarity of the trigrams. A changed word changes three trigrams. In a text of fewer than about 60
tokens it makes a different question ("the dose of X for Y"); in a longer text it does not."""

MIN_SHARED, MIN_CONTAINMENT = 60, 0.85
"""What makes a shared passage long (for example, a case with a different final question): the number of shared
trigrams, and their share of the shorter text."""

TEMPLATE_COPIES = 10
"""A trigram in n texts, with n above this, is probably part of a template. It counts (TEMPLATE_COPIES / n) ** 2."""

MOST_POSTINGS = 500
"""Trigrams in more texts than this give no candidates, which keeps the search linear."""


def close_pairs(texts: Sequence[Sequence[str]], is_linked: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
    """Yield the positions of close texts, as (shorter, longer).

    Args:
        texts: The tokens of each text. A text without tokens is close to none.
        is_linked: Whether a pair needs no comparison. It is called for each pair, so links can grow while the pairs are
            consumed.
    """
    if len(texts) < 2:
        return
    grams = _trigrams(texts)
    sizes_N = np.array([len(own) for own in grams])
    owner_E = np.repeat(np.arange(len(grams)), sizes_N)
    _, gram_E, copies_G = np.unique(np.concatenate(grams), return_inverse=True, return_counts=True)
    weight_G = np.minimum(1.0, (TEMPLATE_COPIES / copies_G) ** 2)
    total_N = np.bincount(owner_E, weight_G[gram_E], minlength=len(grams))
    # A trigram that only one text has cannot be shared. This rules out most texts.
    shareable_N = np.bincount(owner_E, (weight_G * (copies_G > 1))[gram_E], minlength=len(grams))
    probing = np.flatnonzero((shareable_N >= MIN_CONTAINMENT * total_N) & (sizes_N > 0)).tolist()
    ends_N = np.cumsum(sizes_N)

    def grams_of(i: int) -> np.ndarray:
        return gram_E[ends_N[i] - sizes_N[i] : ends_N[i]]

    probes = {i: _rarest(grams_of(i), copies_G, weight_G, total_N[i] * (1 - MIN_CONTAINMENT)) for i in probing}
    postings = _postings(owner_E, gram_E, copies_G, probes.values())
    for i, rarest in probes.items():
        mine = set(grams_of(i).tolist())
        for j in sorted({j for gram in rarest for j in postings.get(gram, ())}):
            is_shorter = (total_N[i], i) < (total_N[j], j)
            if is_shorter and not is_linked(i, j):
                shared = float(weight_G[[gram for gram in grams_of(j).tolist() if gram in mine]].sum())
                if _are_close(shared, total_N[i], total_N[j]):
                    yield i, j


def _trigrams(texts: Sequence[Sequence[str]]) -> list[np.ndarray]:
    """The distinct trigrams of each text, as 63-bit numbers.

    Texts are padded, so that the first and last tokens are in three trigrams too and weigh as much as all others.
    """
    vocabulary: dict[str, int] = {}
    trigrams = []
    for text in texts:
        ids = [0, 0, *(vocabulary.setdefault(token, len(vocabulary) + 1) for token in text), 0, 0]
        # 21 bits per token. With more than two million distinct tokens, a few trigrams are equal by accident.
        ids = np.array(ids, dtype=np.int64) & 0x1FFFFF
        trigrams.append(np.unique(ids[:-2] << 42 | ids[1:-1] << 21 | ids[2:]) if text else np.empty(0, np.int64))
    return trigrams


def _rarest(grams: np.ndarray, copies_G: np.ndarray, weight_G: np.ndarray, slack: float) -> list[int]:
    """The rarest trigrams, until the rest weighs less than a close text must share. A close text shares one of them."""
    ordered = grams[np.lexsort((grams, copies_G[grams]))]
    n = int(np.searchsorted(np.cumsum(weight_G[ordered]), slack, side="right")) + 1
    return ordered[:n][copies_G[ordered[:n]] > 1].tolist()


def _postings(
    owner_E: np.ndarray, gram_E: np.ndarray, copies_G: np.ndarray, probes: Iterable[Sequence[int]]
) -> dict[int, list[int]]:
    """Probed trigram -> the texts that contain it. Trigrams in more than MOST_POSTINGS texts are left out."""
    probed_G = np.zeros(len(copies_G), bool)
    for probe in probes:
        probed_G[probe] = True
    kept_E = (probed_G & (copies_G <= MOST_POSTINGS))[gram_E]
    postings: defaultdict[int, list[int]] = defaultdict(list)
    for gram, i in zip(gram_E[kept_E].tolist(), owner_E[kept_E].tolist(), strict=True):
        postings[gram].append(i)
    return postings


def _are_close(shared: float, shorter: float, longer: float) -> bool:
    is_near = shared >= MIN_JACCARD * (shorter + longer - shared)
    return is_near or (shared >= MIN_SHARED and shared >= MIN_CONTAINMENT * shorter)
