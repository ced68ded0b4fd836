"""Pairs of texts that share nearly all their word trigrams, or a long passage.

The search is exact. An inverted index finds the candidates: a pair can only pass when the shorter text's rarest
trigrams include a shared one (prefix filtering: Bayardo et al., "Scaling up all pairs similarity search", WWW 2007).

Dimensions: N texts, G distinct trigrams, E pairs of a text and one of its trigrams, in the order of the texts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

MIN_JACCARD = 0.9
"""Least share of trigrams in common. One changed word touches three trigrams, so below about 60 tokens it makes another
question ("the dose of X for Y"), and above it does not."""

MIN_SHARED, MIN_CONTAINMENT = 60, 0.85
"""A long passage in common (a case with another question at its end): trigrams shared, and their share of the shorter
prompt."""

TEMPLATE_COPIES = 10
"""A trigram in more prompts than this is on its way to be a template, and counts (copies / prompts) ** 2."""

MOST_POSTINGS = 500
"""Prompts that one trigram may bring up as candidates."""


def close_pairs(texts: Sequence[Sequence[str]], is_linked: Callable[[int, int], bool]) -> Iterator[tuple[int, int]]:
    """Positions of close texts, as (shorter, longer).

    Args:
        texts: each as tokens; a text without any is close to none.
        is_linked: whether a pair need not be compared any more; asked anew for each pair, so that links can grow while
            the pairs are read.
    """
    if len(texts) < 2:
        return
    grams = _trigrams(texts)
    sizes_N = np.array([len(found) for found in grams])
    owner_E = np.repeat(np.arange(len(grams)), sizes_N)
    _, gram_E, copies_G = np.unique(np.concatenate(grams), return_inverse=True, return_counts=True)
    weight_G = np.minimum(1.0, (TEMPLATE_COPIES / copies_G) ** 2)
    total_N = np.bincount(owner_E, weight_G[gram_E], minlength=len(grams))
    # What no other text has cannot be shared: most texts end here.
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
    """Each text's distinct trigrams as numbers of 63 bits.

    Texts are padded, so that a token at an end is in three trigrams too: changing it counts as much as any other.
    """
    vocabulary: dict[str, int] = {}
    found = []
    for text in texts:
        ids = [0, 0, *(vocabulary.setdefault(token, len(vocabulary) + 1) for token in text), 0, 0]
        # 21 bits a token: beyond two million distinct tokens numbers recur, at no cost but a spurious shared trigram.
        ids = np.array(ids, dtype=np.int64) & 0x1FFFFF
        found.append(np.unique(ids[:-2] << 42 | ids[1:-1] << 21 | ids[2:]) if text else np.empty(0, np.int64))
    return found


def _rarest(grams: np.ndarray, copies_G: np.ndarray, weight_G: np.ndarray, slack: float) -> list[int]:
    """The rarest trigrams, until the others weigh too little: a close text shares one of these."""
    ordered = grams[np.lexsort((grams, copies_G[grams]))]
    n = int(np.searchsorted(np.cumsum(weight_G[ordered]), slack, side="right")) + 1
    return ordered[:n][copies_G[ordered[:n]] > 1].tolist()


def _postings(
    owner_E: np.ndarray, gram_E: np.ndarray, copies_G: np.ndarray, probes: Iterable[Sequence[int]]
) -> dict[int, list[int]]:
    """The prompts that hold each probed trigram; none for a trigram that too many hold."""
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
