"""One round of EM on scans that have only records (Zhu et al. 2018, Algorithm 1).

`propose_all` and `explain_all` are the E-step over many scans; `taught` makes of its result what
the weak half of the M-step trains on, `refitted` the next p(record | nodule), `summary` what is
logged.
"""

from __future__ import annotations

import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist

from deepem.detector import propose
from deepem.em import METHODS, EmConfig, Posterior
from deepem.errors import InputError
from deepem.explain import explain
from deepem.labelled import WeakStudy
from deepem.network import NoduleNet
from deepem.nodule import Nodule, Proposal, WeakLabel
from deepem.observation import LOBES, LobeModel, ObservationModel, SizeModel, SliceModel
from deepem.patches import LabelledScan
from deepem.scan import Scan, ScanCache

logger = logging.getLogger(__name__)

_ENOUGH_NODULES = 30
"""Marked, to estimate the smallest radius and the spread of radii from."""

_POSSIBLE = 0.05
"""A proposal with this much of a label, chosen or not, is never taught to be no nodule."""

_AT_LEAST = 0.3
"""Of the labels of a round teach a nodule, however uncertain."""

_KNOWN = 0.5
"""A label of which one chosen proposal has so much is understood: its nodule is not unknown."""


@dataclass(frozen=True, eq=False)
class Explained:
    """The weak labels of one scan, and what a detector and the E-step make of them.

    chosen: for each label the proposals that it was given to; without labels the scan is clean.
    """

    scan: Scan
    study: WeakStudy
    proposals: tuple[Proposal, ...]
    posterior: Posterior
    chosen: list[list[int]]

    @property
    def labels(self) -> tuple[WeakLabel, ...]:
        """The records of the scan."""
        return self.study.labels


def drawn(weak: Sequence[WeakStudy], config: EmConfig, seed: int, number: int) -> list[WeakStudy]:
    """The scans of round ``number``, in the order of ``weak``; each round draws anew."""
    rng = np.random.default_rng([seed, number, 1])
    count = min(config.scans_per_round, len(weak))
    return [weak[at] for at in sorted(rng.choice(len(weak), count, replace=False))]


def propose_all(
    network: NoduleNet,
    weak: Sequence[WeakStudy],
    cache: ScanCache,
    device: torch.device,
    min_logit: float,
) -> Iterator[tuple[WeakStudy, list[Proposal] | InputError]]:
    """What the detector proposes in each scan, several at once, in order.

    A scan that is not in the cache is prepared; one that cannot be read gives its error.
    """
    network.eval()

    def one(item: WeakStudy) -> list[Proposal] | InputError:
        try:
            return propose(network, cache.get(item.study), device, min_logit)
        except InputError as error:
            return error

    workers = max(2, torch.get_num_threads())
    with ThreadPoolExecutor(workers, "e-step") as pool:
        ahead: list[Future[list[Proposal] | InputError]] = []
        try:
            for at, item in enumerate(weak):
                ahead += [pool.submit(one, w) for w in weak[at + len(ahead) : at + workers + 1]]
                yield item, ahead.pop(0).result()
        finally:
            for future in ahead:
                future.cancel()


def explain_all(
    weak: Sequence[WeakStudy],
    rows: Mapping[str, Sequence[Sequence[float]]],
    cache: ScanCache,
    model: ObservationModel,
    config: EmConfig,
    seed: int,
    number: int,
) -> list[Explained]:
    """The E-step of round ``number`` for all scans with proposals (`to_rows`, by series UID).

    Random choices depend on seed, round and series alone, so that an interrupted round can be made
    again from its proposals.
    """
    explained = []
    for item in weak:
        uid = item.study.series_uid
        if uid not in rows:
            continue
        scan, proposals = cache.get(item.study), from_rows(rows[uid])
        posterior = explain(
            item.labels, proposals, scan, model,
            null=config.null, joint=config.joint, odds=config.odds,
        )  # fmt: skip
        rng = np.random.default_rng([seed, number, zlib.crc32(uid.encode())])
        chosen = METHODS[config.method](posterior, rng)
        explained.append(Explained(scan, item, tuple(proposals), posterior, chosen))
    return certain_ones(explained, config.certain) if config.certain else explained


def certain_ones(explained: Sequence[Explained], certain: float) -> list[Explained]:
    """The same without the choices that have less than ``certain`` of their label.

    A young detector is certain of nothing. Then the best guesses of three labels in ten stay, also
    against the null hypothesis: easy ones first (Kumar et al. 2010, self-paced learning).
    """
    best = [row.max(initial=0.0) for item in explained for row in item.posterior.posterior]
    enough = math.ceil(_AT_LEAST * len(best))
    limit = min(certain, sorted(best)[-enough]) if best else certain

    def kept(row: np.ndarray, choice: list[int]) -> list[int]:
        left = [at for at in choice if row[at] >= limit]
        if not left and limit < certain and row.max(initial=0.0) >= limit > 0:
            return [int(row.argmax())]
        return left

    return [
        replace(item, chosen=list(map(kept, item.posterior.posterior, item.chosen)))
        for item in explained
    ]


def taught(explained: Explained, config: EmConfig) -> LabelledScan:
    """What one scan teaches: the chosen proposals as nodules, and where it teaches nothing.

    Weights are the posterior for ``soft``, else the share of a label's draws (Eq. 7). A proposal
    that might be a reported nodule but was not chosen teaches nothing (Eq. 4), nor does anything
    else near a reported slice, or anywhere in a scan whose label has none. With ``config.rejected``
    that is so for labels alone whose nodule is still unknown: all other proposals are taught to be
    none, but for those that lie in one that might be a nodule. With ``config.size`` a nodule has
    the diameter that was reported.
    """
    posterior = explained.posterior.posterior
    weight = np.zeros_like(posterior)
    for row, chosen in enumerate(explained.chosen):
        if config.method == "soft":
            weight[row, chosen] = posterior[row, chosen]
        elif chosen:
            np.add.at(weight[row], chosen, 1 / _draws(config.method))
    total = weight.sum(0).clip(max=1.0)
    possible = (total > 0) | (posterior >= _POSSIBLE).any(0)
    unsure_z_mm = [
        _unsure(label, config.clearance_mm + 2 * config.slice_off_mm)
        for row, (label, chosen) in enumerate(zip(explained.labels, explained.chosen, strict=True))
        if not (config.rejected and posterior[row, chosen].max(initial=0) >= _KNOWN)
    ]
    ruled_out = np.zeros_like(possible)
    if config.rejected:
        z_mm = np.array([one.nodule.center_lps_mm[2] for one in explained.proposals])
        low, high = np.reshape(unsure_z_mm, (-1, 2)).T[..., None]
        unsure = ((z_mm >= low) & (z_mm <= high)).any(0)
        ruled_out = ~possible & ~unsure & ~_inside(explained.proposals, possible)
    rows = np.flatnonzero(possible | ruled_out)
    return LabelledScan(
        explained.scan,
        tuple(_as_reported(explained, at, config) for at in rows),
        explained.study.study.patient_id,
        tuple(total[rows].tolist()),
        tuple(ruled_out[rows].astype(float).tolist()),
        tuple(unsure_z_mm),
    )


def _inside(proposals: Sequence[Proposal], which: np.ndarray) -> np.ndarray:
    """(P,) bool: whose centre lies in one of the proposals ``which`` (P,)."""
    center = np.reshape([one.nodule.center_lps_mm for one in proposals], (-1, 3))
    radius = np.array([one.nodule.diameter_mm for one in proposals]) / 2
    return (cdist(center, center[which]) < radius[which]).any(1)


def _as_reported(explained: Explained, at: int, config: EmConfig) -> Nodule:
    """A proposal with the diameter of the record that it most probably belongs to.

    Else a detector that finds nodules too small would learn just that from itself.
    """
    nodule = explained.proposals[at].nodule
    share = explained.posterior.posterior[:, at]
    if not config.size or not len(share) or share.max() < _POSSIBLE:
        return nodule
    reported_mm = explained.labels[int(share.argmax())].diameter_mm
    return replace(nodule, diameter_mm=reported_mm) if reported_mm else nodule


def _draws(method: str) -> int:
    return 2 if method == "sampling" else 1


def _unsure(label: WeakLabel, clearance_mm: float) -> tuple[float, float]:
    if label.z_lps_mm is None:
        return -math.inf, math.inf
    return label.z_lps_mm - clearance_mm, label.z_lps_mm + clearance_mm


def first_model(config: EmConfig, diameter_mm: Sequence[float] = ()) -> ObservationModel:
    """p(record | nodule) before anything is learned from records.

    diameter_mm: of marked nodules; with enough of them they say how far a slice may be off (Eq. 3),
    else the paper's constants do.
    """
    enough = len(diameter_mm) >= _ENOUGH_NODULES
    slices = SliceModel.fitted(np.array(diameter_mm)) if enough else SliceModel()
    return ObservationModel(
        slices.blurred(config.slice_off_mm),
        LobeModel.anatomical(config.wrong_lobe),
        SizeModel() if config.size else None,
        config.attenuation,
    )


def refitted(model: ObservationModel, explained: Sequence[Explained]) -> ObservationModel:
    """The M-step of p(record | nodule): lobes and sizes of all proposals, by their posterior."""
    relative, lobes, of_lobe = [np.empty((0, 3))], [], []
    log_ratio, of_size = [], []
    for item in explained:
        center = np.array([p.nodule.center_lps_mm for p in item.proposals]).reshape(-1, 3)
        diameter = np.array([p.nodule.diameter_mm for p in item.proposals])
        position = item.scan.lungs.relative(center)
        for label, row in zip(item.labels, item.posterior.posterior, strict=True):
            rows = np.flatnonzero(row >= _POSSIBLE)
            if label.lobe is not None:
                relative.append(position[rows])
                lobes += [label.lobe] * len(rows)
                of_lobe += row[rows].tolist()
            if label.diameter_mm is not None:
                log_ratio += np.log(label.diameter_mm / diameter[rows]).tolist()
                of_size += row[rows].tolist()
    lobe = model.lobe.refitted(np.concatenate(relative), lobes, np.array(of_lobe))
    size = model.size and model.size.refitted(np.array(log_ratio), np.array(of_size))
    return replace(model, lobe=lobe, size=size)


def summary(explained: Sequence[Explained], model: ObservationModel) -> dict[str, Any]:
    """What a round is judged by, without any truth; None where there is nothing to average.

    unexplained: share of labels that went to the null hypothesis. entropy, evidence: nats, means
    over the labels. lobe_accuracy: how often the lobe model names the reported lobe at the
    proposal with the largest posterior. size_bias: reported diameters over proposed ones.
    """
    posterior = [item.posterior for item in explained]
    entropy = np.concatenate([np.empty(0), *(one.entropy for one in posterior)])
    evidence = np.concatenate([np.empty(0), *(one.log_evidence for one in posterior)])
    evidence = evidence[np.isfinite(evidence)]
    chosen = [bool(choice) for item in explained for choice in item.chosen]
    lobe = model.lobe
    right = [
        LOBES[int(lobe.log_probability(item.scan.lungs.relative(center[None])).argmax())]
        is label.lobe
        for item in explained
        for label, row in zip(item.labels, item.posterior.posterior, strict=True)
        if label.lobe is not None and row.any()
        for center in [np.array(item.proposals[int(row.argmax())].nodule.center_lps_mm)]
    ]
    return {
        "scans": len(explained),
        "labels": len(chosen),
        "proposals_per_scan": _mean([len(item.proposals) for item in explained]),
        "unexplained": _mean(1 - np.array(chosen, float)),
        "evidence": _mean(evidence),
        "entropy": _mean(entropy),
        "lobe_accuracy": _mean(right),
        "size_bias": round(math.exp(model.size.log_bias), 4) if model.size else None,
    }


def details(explained: Sequence[Explained]) -> list[dict[str, Any]]:
    """Every label of a round for a JSON file, with the proposals of its scan."""
    return [
        {
            "seriesuid": item.scan.series_uid,
            "proposals": to_rows(item.proposals),
            "labels": [
                {
                    "source": label.source,
                    "lobe": label.lobe.value if label.lobe else None,
                    "z_lps_mm": label.z_lps_mm,
                    "posterior": np.round(item.posterior.posterior[row], 5).tolist(),
                    "null": round(float(item.posterior.null[row]), 5),
                    "chosen": item.chosen[row],
                    "evidence": _finite(item.posterior.log_evidence[row]),
                    "entropy": float(item.posterior.entropy[row]),
                }
                for row, label in enumerate(item.labels)
            ],
        }
        for item in explained
    ]


def _mean(values: Any) -> float | None:
    return round(float(np.mean(values)), 5) if len(values) else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def to_rows(proposals: Sequence[Proposal]) -> list[list[float]]:
    """Proposals as rows of x, y, z in LPS mm, diameter in mm, logit: for files."""
    return [[*p.nodule.center_lps_mm, p.nodule.diameter_mm, p.logit] for p in proposals]


def from_rows(rows: Sequence[Sequence[float]]) -> list[Proposal]:
    """What `to_rows` was given."""
    return [Proposal(Nodule((x, y, z), diameter), logit) for x, y, z, diameter, logit in rows]
