"""From the evidence of many scans to their order, under a name."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from deepem.ranking.acquisition import (
    box_entropy,
    flip_inconsistency,
    foreground_aware,
    hybrid,
    k_center,
)
from deepem.ranking.evidence import ScanEvidence

BATCH = 8
"""Scans that are labelled before the next model; `hybrid` makes these diverse."""

MOST_CENTERS = 500
"""As many scans are chosen one by one by `k_center`, which is quadratic; enough until the next."""


@dataclass(frozen=True, eq=False)
class Pool:
    """What a strategy chooses from: N scans, and the features (M, F) of those that are labelled."""

    scans: Sequence[ScanEvidence]
    labelled: np.ndarray
    rng: np.random.Generator
    batch: int = BATCH

    @property
    def features(self) -> np.ndarray:
        """(N, F)."""
        return np.stack([scan.features for scan in self.scans])

    def by_score(self, score: Callable[[ScanEvidence], float]) -> tuple[np.ndarray, np.ndarray]:
        """Order and score, (N,) each: larger first, equals at random."""
        values = np.array([score(scan) for scan in self.scans])
        return np.lexsort([self.rng.random(len(values)), -values]), values


@dataclass(frozen=True)
class Strategy:
    """order: pool -> indices (N,) in the order to label them, and scores (N,) of all scans.

    reason: what is said of a scan beside what the evidence says; "" where that says it all.
    flips: whether the mirror images are looked at.
    """

    description: str
    order: Callable[[Pool], tuple[np.ndarray, np.ndarray]]
    reason: str = ""
    flips: bool = False


def entropy_of_boxes(scan: ScanEvidence) -> float:
    """See `box_entropy`."""
    return box_entropy(scan.proposals[:, 4])


def change_by_flip(scan: ScanEvidence) -> float:
    """See `flip_inconsistency`."""
    return flip_inconsistency(*_arrays(scan.proposals), *_arrays(scan.mirrored))


def entropy_of_records(scan: ScanEvidence) -> float:
    """Of the most ambiguous record, in nats; 0 without any."""
    return max((record.entropy for record in scan.records or ()), default=0.0)


def _arrays(proposals: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Centres (P, 3), radii (P,) and probabilities (P,) of the rows of `ScanEvidence`."""
    return proposals[:, :3], proposals[:, 3] / 2, expit(proposals[:, 4])


def _shuffle(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    order = pool.rng.permutation(len(pool.scans))
    return order, _falling(order)


def _foreground(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    order = foreground_aware(np.array([scan.foreground for scan in pool.scans]), pool.rng)
    return order, _falling(order)


def _k_center(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    return k_center(pool.features, pool.labelled, MOST_CENTERS)


def _hybrid(pool: Pool) -> tuple[np.ndarray, np.ndarray]:
    order, score = pool.by_score(entropy_of_boxes)
    ranked = hybrid(score[order], pool.features[order], pool.labelled, pool.batch)
    return order[ranked], score


def _falling(order: np.ndarray) -> np.ndarray:
    """A score for an order without any: 1 for the first, towards 0 for the last."""
    score = np.empty(len(order))
    score[order] = 1 - np.arange(len(order)) / len(order)
    return score


STRATEGIES = {
    "shuffle": Strategy("Scans at random", _shuffle, "drawn at random"),
    "foreground": Strategy(
        "At random, two of three with a nodule by record or detector", _foreground,
        "drawn at random",
    ),
    "box_entropy": Strategy(
        "Scans with the most uncertain findings", lambda pool: pool.by_score(entropy_of_boxes)
    ),
    "flip_consistency": Strategy(
        "Scans whose findings change most when mirrored",
        lambda pool: pool.by_score(change_by_flip), flips=True,
    ),
    "em_entropy": Strategy(
        "Scans with the most ambiguous record", lambda pool: pool.by_score(entropy_of_records)
    ),
    "k_center": Strategy(
        "Scans least like those labelled so far", _k_center, "unlike the labelled scans"
    ),
    "hybrid": Strategy("Uncertain scans, unlike each other", _hybrid),
}  # fmt: skip
"""By name. ``random`` is no name here: clients send it whatever their user chose."""

DEFAULT = "foreground"
"""The honest baseline: another takes its place when `scripts/benchmarks/campaign.py` shows it."""


@dataclass(frozen=True)
class Ranked:
    """A scan in its place: rank from 1; no score for a scan that could not be looked at."""

    series_uid: str
    rank: int
    score: float | None
    why: str


def rank(
    strategy: str,
    scans: Sequence[ScanEvidence],
    labelled: Sequence[ScanEvidence] = (),
    failed: Sequence[tuple[str, str]] = (),
    seed: int = 0,
    batch: int = BATCH,
) -> list[Ranked]:
    """All ``scans`` in the order in which to label them, then those that ``failed``, with reasons.

    batch: as many are labelled before the next model, roughly. The same scans in another order give
    the same ranking. ValueError for an unknown strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: expected one of {', '.join(STRATEGIES)}, got {strategy}")
    scans = sorted(scans, key=lambda scan: scan.series_uid)
    chosen = STRATEGIES[strategy]
    ranking: list[Ranked] = []
    if scans:
        known = np.array([scan.features for scan in labelled]).reshape(-1, len(scans[0].features))
        order, score = chosen.order(Pool(scans, known, np.random.default_rng(seed), batch))
        for at in order:
            why = "; ".join(filter(None, (chosen.reason, _why(scans[at]))))
            ranking.append(Ranked(scans[at].series_uid, len(ranking) + 1, float(score[at]), why))
    for uid, reason in sorted(failed):
        ranking.append(Ranked(uid, len(ranking) + 1, None, f"cannot be used: {reason}"))
    return ranking


_UNCERTAIN = (0.2, 0.8)
"""Probabilities between which a finding is called uncertain."""


def _why(scan: ScanEvidence) -> str:
    """One short sentence: what the detector sees, and what the records say to that."""
    p = expit(scan.proposals[:, 4])
    unsure, sure = ((p >= _UNCERTAIN[0]) & (p <= _UNCERTAIN[1])).sum(), (p > _UNCERTAIN[1]).sum()
    parts = []
    if unsure:
        parts.append(_counted(unsure, "uncertain finding"))
    elif sure:
        parts.append(_counted(sure, "clear finding"))
    else:
        parts.append("no findings")
    if scan.records is not None:
        parts.append(_what_records_say(scan))
    return "; ".join(parts)


def _what_records_say(scan: ScanEvidence) -> str:
    if not scan.records:
        return "a record calls it free of nodules"
    record = max(scan.records, key=lambda one: one.entropy)
    text = f"the record names {record.says}"
    if record.missed >= 0.5:
        return f"{text}, where the detector finds nothing"
    competing = round(math.exp(record.entropy))  # as many equal ones would be as ambiguous
    if competing > 1:
        return f"{text}, but {_number(competing)} proposals compete"
    return f"{text}, and one proposal fits"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count > 1 else ''}"


def _number(count: int) -> str:
    words = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
    return words[count - 2] if count - 2 < len(words) else str(count)
