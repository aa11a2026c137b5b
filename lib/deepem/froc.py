"""FROC: sensitivity against false positives per scan, by the rules of the LUNA16 challenge.

Source: Setio et al., "Validation, comparison, and combination of algorithms for automatic detection
of pulmonary nodules in computed tomography images: the LUNA16 challenge", Medical Image Analysis 42
(2017). A proposal hits a nodule when its centre lies strictly inside the nodule's sphere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.distance import cdist
from scipy.special import expit

from deepem.nodule import Nodule, Proposal

FP_RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per scan at which the challenge reads the curve."""

MAX_MARKS = 100
"""Proposals of one scan that the challenge looks at."""

_Nodules = Mapping[str, Sequence[Nodule]]
_Proposals = Mapping[str, Sequence[Proposal]]


@dataclass(frozen=True, eq=False)
class Froc:
    """Result of one evaluation.

    Without a single nodule there is no sensitivity: ``sensitivity``, ``cpm`` and the curve are then
    NaN while the counts still hold, so that a set of clean scans can be evaluated for its false
    positives; `report` turns NaN into None.
    """

    fp_per_scan: tuple[float, ...]
    """The seven rates, `FP_RATES`."""
    sensitivity: tuple[float, ...]
    """At these rates, linear between the points of the curve, constant after the last."""
    cpm: float
    """Mean of the seven sensitivities (competition performance metric)."""
    nodules: int
    true_positives: int
    """Nodules that at least one proposal hits."""
    false_positives: int
    scans: int
    ignored_excluded: int
    """Proposals that hit an excluded finding and no nodule: neither true nor false."""
    double_hits: int
    """Further hits on nodules that are already found: neither true nor false."""
    candidates_kept: int
    """Proposals left by the cap on marks per scan."""
    curve_fp_per_scan: np.ndarray
    """(T,) rising from 0."""
    curve_sensitivity: np.ndarray
    """(T,) rising from 0."""
    curve_threshold: np.ndarray
    """(T,) falling probability; the point counts proposals at or above it. Starts at infinity."""

    def report(self) -> dict[str, int | float | list[float | None] | None]:
        """Everything but the curve, ready for JSON: None where a number does not exist."""
        return {
            "fp_per_scan": list(self.fp_per_scan),
            "sensitivity": [None if np.isnan(value) else value for value in self.sensitivity],
            "cpm": None if np.isnan(self.cpm) else self.cpm,
            "nodules": self.nodules,
            "true_positives": self.true_positives,
            "false_positives": self.false_positives,
            "scans": self.scans,
            "ignored_excluded": self.ignored_excluded,
            "double_hits": self.double_hits,
            "candidates_kept": self.candidates_kept,
        }


def evaluate(
    annotations: Mapping[str, Sequence[Any]],
    predictions: _Proposals,
    series: Sequence[str],
    excluded: _Nodules | None = None,
    max_marks: int = MAX_MARKS,
    *,
    hits: Callable[[Sequence[Any], np.ndarray], np.ndarray] | None = None,
) -> Froc:
    """Compare predictions with annotations over the scans in ``series``.

    A scan that is missing in a mapping has no such findings; it still counts as a scan. Scans that
    are in a mapping but not in ``series`` do not count. Proposals rank by their logits, which keep
    apart what probabilities near 1 no longer do. With nodules but without proposals all
    sensitivities are 0. hits: (M annotations, (P, 3) LPS mm) -> (M, P) bool, where annotations are
    something else than nodules; by default a centre strictly inside the sphere. ValueError when
    ``series`` is empty or names a scan twice.
    """
    matches = _match(annotations, predictions, series, excluded, max_marks, hits or _hits)
    threshold, rates, sensitivities = _curves(matches, np.ones((1, len(series))))
    rate, sensitivity = rates[0], sensitivities[0]
    at_rates = np.interp(FP_RATES, rate, sensitivity)
    return Froc(
        fp_per_scan=FP_RATES,
        sensitivity=tuple(at_rates.tolist()),
        cpm=float(at_rates.mean()),
        nodules=len(matches.nodule_logit),
        true_positives=int(np.isfinite(matches.nodule_logit).sum()),
        false_positives=len(matches.fp_logit),
        scans=len(series),
        ignored_excluded=matches.ignored_excluded,
        double_hits=matches.double_hits,
        candidates_kept=matches.candidates_kept,
        curve_fp_per_scan=rate,
        curve_sensitivity=sensitivity,
        curve_threshold=np.where(np.isinf(threshold), np.inf, expit(threshold)),
    )


def bootstrap_cpm(
    annotations: _Nodules,
    predictions: _Proposals,
    series: Sequence[str],
    excluded: _Nodules | None = None,
    max_marks: int = MAX_MARKS,
    *,
    rng: np.random.Generator,
    resamples: int = 1000,
) -> tuple[float, float]:
    """95 % interval of the CPM: the 2.5 and 97.5 % quantiles over scans drawn with replacement.

    Resamples without any nodule have no CPM and are left out; NaN twice when that leaves none.
    """
    matches = _match(annotations, predictions, series, excluded, max_marks, _hits)
    times_drawn = rng.multinomial(len(series), np.full(len(series), 1 / len(series)), resamples)
    times_drawn = times_drawn[times_drawn[:, matches.nodule_scan].any(axis=1)]
    if not len(times_drawn):
        return np.nan, np.nan
    events = len(matches.nodule_logit) + len(matches.fp_logit)
    chunks = -(-len(times_drawn) * events // 4_000_000)  # about 100 MB of curves at once
    cpm = [
        np.interp(FP_RATES, rate, sensitivity).mean()
        for weights in np.array_split(times_drawn, max(chunks, 1))
        for rate, sensitivity in zip(*_curves(matches, weights)[1:], strict=True)
    ]
    low, high = np.quantile(cpm, [0.025, 0.975])
    return float(low), float(high)


def first_hit_fp_rates(
    annotations: _Nodules,
    predictions: _Proposals,
    series: Sequence[str],
    excluded: _Nodules | None = None,
    max_marks: int = MAX_MARKS,
) -> dict[str, list[float | None]]:
    """What every nodule costs: false positives per scan at the threshold that first finds it.

    By series UID, in the order of the annotations; None for a nodule that is never found.
    """
    matches = _match(annotations, predictions, series, excluded, max_marks, _hits)
    ascending = np.sort(matches.fp_logit)
    at_least = len(ascending) - np.searchsorted(ascending, matches.nodule_logit, side="left")
    rates: dict[str, list[float | None]] = {uid: [] for uid in series}
    for scan, logit, count in zip(matches.nodule_scan, matches.nodule_logit, at_least, strict=True):
        found = np.isfinite(logit)
        rates[series[scan]].append(float(count / len(series)) if found else None)
    return rates


@dataclass(frozen=True, eq=False)
class _Matches:
    """Every nodule and every false positive, with its score and its scan."""

    nodule_logit: np.ndarray  # (N,) of the best proposal that hits it, -inf when missed
    nodule_scan: np.ndarray  # (N,) position in series
    fp_logit: np.ndarray  # (F,)
    fp_scan: np.ndarray  # (F,)
    ignored_excluded: int
    double_hits: int
    candidates_kept: int


def _match(
    annotations: Mapping[str, Sequence[Any]],
    predictions: _Proposals,
    series: Sequence[str],
    excluded: _Nodules | None,
    max_marks: int,
    hits_of: Callable[[Sequence[Any], np.ndarray], np.ndarray],
) -> _Matches:
    if not len(series):
        raise ValueError("series: expected at least one scan, got none")
    if len(set(series)) != len(series):
        raise ValueError("series: expected every scan once, got repeated ones")
    if max_marks < 1:
        raise ValueError(f"max_marks: expected 1 or more, got {max_marks}")
    nodule_logits, fp_logits = [], []
    ignored = doubles = kept = 0
    for uid in series:
        centers, logit = _capped(predictions.get(uid, ()), max_marks)
        hits = hits_of(annotations.get(uid, ()), centers)
        hits_excluded = _hits(excluded.get(uid, ()) if excluded else (), centers).any(axis=0)
        free = ~hits.any(axis=0)
        nodule_logits.append(np.where(hits, logit, -np.inf).max(axis=1, initial=-np.inf))
        fp_logits.append(logit[free & ~hits_excluded])
        ignored += int((free & hits_excluded).sum())
        doubles += int((hits.sum(axis=1) - 1).clip(min=0).sum())
        kept += len(logit)
    return _Matches(
        np.concatenate(nodule_logits),
        np.repeat(np.arange(len(series)), list(map(len, nodule_logits))),
        np.concatenate(fp_logits),
        np.repeat(np.arange(len(series)), list(map(len, fp_logits))),
        ignored,
        doubles,
        kept,
    )


def _capped(proposals: Sequence[Proposal], max_marks: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres (P, 3) and logits (P,) of those scored strictly above the first one past the cap."""
    centers = np.array([p.nodule.center_lps_mm for p in proposals], dtype=np.float64)
    logit = np.array([p.logit for p in proposals], dtype=np.float64)
    keep = np.ones(len(logit), dtype=bool)
    if len(logit) > max_marks:
        keep = logit > np.sort(logit)[::-1][max_marks]
    return centers.reshape(-1, 3)[keep], logit[keep]


def _hits(nodules: Sequence[Nodule], centers_lps_mm: np.ndarray) -> np.ndarray:
    """(N, P) which of P centres lies strictly inside which nodule."""
    spheres = np.array([n.center_lps_mm for n in nodules], dtype=np.float64).reshape(-1, 3)
    radius = np.array([n.diameter_mm / 2 for n in nodules], dtype=np.float64)
    if not len(spheres) or not len(centers_lps_mm):
        return np.zeros((len(spheres), len(centers_lps_mm)), dtype=bool)
    return cdist(spheres, centers_lps_mm, "sqeuclidean") < radius[:, None] ** 2


def _curves(matches: _Matches, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logit thresholds (T,), false positives per scan (R, T) and sensitivities (R, T).

    weights: (R, S), how often each of the S scans counts; R = 1 and all ones is the plain curve.
    """
    found = np.isfinite(matches.nodule_logit)
    logit = np.concatenate([matches.nodule_logit[found], matches.fp_logit])
    scan = np.concatenate([matches.nodule_scan[found], matches.fp_scan])
    is_hit = np.arange(len(logit)) < found.sum()
    order = np.argsort(-logit, kind="stable")
    logit, scan, is_hit = logit[order], scan[order], is_hit[order]
    # Equal scores enter together: the curve has one point for each distinct score.
    last_of_tie = np.flatnonzero(np.diff(logit, append=-np.inf))
    each = weights[:, scan].astype(np.float64)
    start = np.zeros((len(weights), 1))
    fps = np.hstack([start, np.cumsum(each * ~is_hit, axis=1)[:, last_of_tie]])
    hits = np.hstack([start, np.cumsum(each * is_hit, axis=1)[:, last_of_tie]])
    # Dividing by all false positives and multiplying back looks idle, but the challenge takes the
    # rate from a ROC curve in this way, and where sensitivity steps up exactly at one of the seven
    # rates, its rounding decides which end of the step counts.
    all_fps = fps[:, -1:].clip(min=1)
    rate = fps / all_fps * all_fps / weights.sum(axis=1, keepdims=True)
    nodules = weights[:, matches.nodule_scan].sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore"):  # 0 / 0 without nodules is the NaN we want
        sensitivity = hits / nodules
    return np.append(np.inf, logit[last_of_tie]), rate, sensitivity
