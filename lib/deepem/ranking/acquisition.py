"""Acquisition functions: how much would a scan teach? One small pure function each.

Larger is sooner. P proposals of one scan, N scans to choose from, M scans that are labelled, F
features.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from scipy.special import entr, expit

TOP = 3
"""Findings of a scan that count. A sum over all of them would favour cluttered scans."""


def top_mean(values: np.ndarray, top: int = TOP) -> float:
    """Mean of the ``top`` largest of (P,); where there are fewer, the others count as 0.

    So a proposal of which the detector is sure changes nothing, whether it is there or not, and a
    scan without proposals has 0, the least.
    """
    return float(np.sort(values)[::-1][:top].sum()) / top


def entropy(logit: np.ndarray) -> np.ndarray:
    """(P,) logits -> (P,) entropy of nodule or none, both terms, in nats."""
    p = expit(np.asarray(logit, dtype=np.float64))
    return entr(p) + entr(1 - p)


def box_entropy(logit: np.ndarray, top: int = TOP) -> float:
    """How unsure the detector is of its findings, (P,) logits: mean entropy of the least sure."""
    return top_mean(entropy(logit), top)


def flip_inconsistency(
    center_mm: np.ndarray,
    radius_mm: np.ndarray,
    probability: np.ndarray,
    mirrored_center_mm: np.ndarray,
    mirrored_radius_mm: np.ndarray,
    mirrored_probability: np.ndarray,
    top: int = TOP,
) -> float:
    """How much findings (P, 3), (P,), (P,) change when the scan is mirrored: (Q, 3), (Q,), (Q,).

    Both in the same world. Findings are paired one to one, where one centre lies in the other's
    sphere, nearest first as a whole (Hungarian method). A pair disagrees by the difference of its
    probabilities, a finding without partner by its probability; the mean of the largest counts. No
    findings in both is agreement: 0, the least.
    """
    distance = cdist(np.reshape(center_mm, (-1, 3)), np.reshape(mirrored_center_mm, (-1, 3)))
    near = distance < np.maximum.outer(radius_mm, mirrored_radius_mm)
    # Far costs more than all near pairs together, so that no pair is given up for a shorter sum.
    far = distance[near].sum() + 1
    rows, columns = linear_sum_assignment(np.where(near, distance, far))
    paired = near[rows, columns]
    rows, columns = rows[paired], columns[paired]
    pairs = np.abs(probability[rows] - mirrored_probability[columns])
    alone = np.delete(probability, rows), np.delete(mirrored_probability, columns)
    return top_mean(np.concatenate([pairs, *alone]), top)


def foreground_aware(
    foreground: np.ndarray, rng: np.random.Generator, share: float = 2 / 3
) -> np.ndarray:
    """A random order (N,) in which scans that seem to have a nodule, (N,) bool, come more often.

    Among the first n there are at least ``share * n`` of them while they last; within both kinds
    the order is random. The honest baseline where most scans are empty (nnActive).
    """
    drawn = rng.permutation(len(foreground))
    some = list(drawn[foreground[drawn]])
    none = list(drawn[~foreground[drawn]])
    fair = len(some) / max(len(drawn), 1)  # never fewer than chance alone would give
    order: list[int] = []
    taken = 0
    for count in range(1, len(drawn) + 1):
        wanted = taken < max(share, fair) * count
        taken += bool(some and (wanted or not none))
        order.append((some if some and (wanted or not none) else none).pop(0))
    return np.array(order, dtype=int)


def k_center(
    features: np.ndarray, labelled: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Greedy k-center: each time the scan (N, F) farthest from all labelled (M, F) and chosen ones.

    Order (N,) and distance (N,): the first ``count`` are chosen so, at distances that never rise;
    the others follow by their distance to what is then labelled or chosen. Without labelled scans
    it begins with the one nearest to the mean. Features are made comparable by their spread. Sener
    and Savarese, ICLR 2018.
    """
    both = np.concatenate([features, labelled.reshape(-1, features.shape[1])])
    spread = both.std(0)
    scaled = (both - both.mean(0)) / np.where(spread > 0, spread, 1)
    pool, centers = scaled[: len(features)], scaled[len(features) :]
    distance = np.full(len(pool), np.inf)
    if len(centers):
        distance = cdist(pool, centers).min(1)
    chosen: list[int] = []
    left = np.ones(len(pool), bool)
    for _ in range(min(count, len(pool))):
        if chosen or len(centers):
            at = int(np.where(left, distance, -1).argmax())
        else:
            at = int(np.linalg.norm(pool, axis=1).argmin())
        chosen.append(at)
        left[at] = False
        to_chosen = np.linalg.norm(pool[left] - pool[at], axis=1)
        distance[left] = np.minimum(distance[left], to_chosen)
    if not len(centers) and len(chosen):  # the first one was chosen before there was any distance
        distance[chosen[0]] = distance[np.arange(len(pool)) != chosen[0]].max(initial=0)
    others = np.flatnonzero(left)
    others = others[np.argsort(-distance[others], kind="stable")]
    return np.concatenate([np.array(chosen, int), others]), distance


def hybrid(
    uncertainty: np.ndarray, features: np.ndarray, labelled: np.ndarray, batch: int, pool: int = 4
) -> np.ndarray:
    """An order (N,): of the ``pool * batch`` most uncertain scans first ``batch`` diverse ones.

    Diverse by `k_center`; all others follow by uncertainty (N,), larger first.
    """
    by_uncertainty = np.argsort(-uncertainty, kind="stable")
    candidates = by_uncertainty[: pool * batch]
    diverse, _ = k_center(features[candidates], labelled, batch)
    first = candidates[diverse[:batch]]
    return np.concatenate([first, by_uncertainty[~np.isin(by_uncertainty, first)]])
