"""Scans with labels: who is trained on, who is held out, and what of it can be read."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from deepem.errors import InputError
from deepem.nodule import Nodule, WeakLabel
from deepem.patches import LabelledScan
from deepem.scan import ScanCache
from deepem.volume import Study
from deepem.weak_labels import Records, ScanSlices, in_patient_space, read_slices

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledStudy:
    """A scan on disk with all of its nodules; none means that a reader found it clean."""

    study: Study
    nodules: tuple[Nodule, ...]


@dataclass(frozen=True)
class WeakStudy:
    """A scan on disk of which only records tell: its weak labels, with their slices in mm.

    No labels means that the record calls it free of nodules.
    """

    study: Study
    labels: tuple[WeakLabel, ...]


def patient_hash(patient_id: str) -> str:
    """What a model card says of a patient: enough to know them again, no name."""
    return hashlib.blake2b(patient_id.encode(), digest_size=8).hexdigest()


_Item = TypeVar("_Item", LabelledStudy, WeakStudy)


def split_by_patient(
    items: Sequence[_Item],
    share: float,
    seed: int,
    known: frozenset[str] = frozenset(),
    *,
    marked: Callable[[_Item], bool],
    most: int | None = None,
) -> tuple[list[_Item], list[_Item]]:
    """(training, validation) without a patient in both; ``most`` patients in validation.

    Patients are ordered by a hash, so that a scan that arrives later moves few others. marked:
    whether a scan has a nodule; both sides get at least one patient with such a scan. known:
    `patient_hash` of patients that the model to start from or to beat was trained on; they are held
    out only if nobody else is there, since a model looks better than it is on scans that it knows.
    ValueError when fewer than two patients have nodules.
    """

    def rank(patient: str) -> tuple[bool, str]:
        order = hashlib.blake2b(f"{seed}/{patient}".encode()).hexdigest()
        return patient_hash(patient) in known, order

    patients = sorted({item.study.patient_id for item in items}, key=rank)
    with_nodules = {item.study.patient_id for item in items if marked(item)}
    if len(with_nodules) < 2:
        raise ValueError(
            "labels: expected nodules in scans of at least 2 patients (one to train on, one to "
            f"measure on), got {len(with_nodules)} of {len(patients)}"
        )
    held_out = set(patients[: max(1, min(round(share * len(patients)), most or len(patients)))])
    in_order = [patient for patient in patients if patient in with_nodules]
    if not held_out & with_nodules:
        held_out.add(in_order[0])
    if with_nodules <= held_out:
        held_out.discard(in_order[-1])
    return (
        [item for item in items if item.study.patient_id not in held_out],
        [item for item in items if item.study.patient_id in held_out],
    )


def load_labelled(
    labelled: Sequence[LabelledStudy],
    cache: ScanCache,
    on_done: Callable[[int, int], None] | None = None,
) -> tuple[list[LabelledScan], list[str]]:
    """Prepared scans, and one line for each that could not be used."""
    scans, skipped = [], []
    for count, item in enumerate(labelled, 1):
        try:
            scan = cache.get(item.study)
            scans.append(LabelledScan(scan, item.nodules, item.study.patient_id))
            _warn_outside(scans[-1])
        except InputError as error:
            logger.warning("skipped: %s", error)
            skipped.append(str(error))
        if on_done:
            on_done(count, len(labelled))
    return scans, skipped


def _warn_outside(labelled: LabelledScan) -> None:
    center, _ = labelled.arrays()
    shape = np.array(labelled.scan.image.shape)
    for nodule in np.flatnonzero(((center < -0.5) | (center > shape - 0.5)).any(1)):
        logger.warning("%s: %s lies outside the prepared scan (lungs and 12 mm around them)",
                       labelled.scan.series_uid, labelled.nodules[nodule])  # fmt: skip


def weak_studies(
    records: Records, studies: Mapping[str, Study]
) -> tuple[list[WeakStudy], list[InputError]]:
    """Scans that records tell of, and everything that cannot be used, with its reason.

    studies: by series UID. Only headers are read; what is usable, `usable_labels` says.
    """
    slices, unread = {}, []
    for uid in records.series:
        if uid in studies:
            try:
                slices[uid] = read_slices(studies[uid])
            except InputError as error:
                unread.append(error)
    usable, rejected = usable_labels(records, slices)
    return [WeakStudy(studies[uid], labels) for uid, labels in usable.items()], [*unread, *rejected]


def usable_labels(
    records: Records, slices: Mapping[str, ScanSlices]
) -> tuple[dict[str, tuple[WeakLabel, ...]], list[InputError]]:
    """Placed labels of every scan that can be learned from; none for a clean one. And the rest.

    slices: by series UID. A record that calls a scan clean loses against one that names a nodule in
    it. A scan of which one label cannot be placed is left out whole: what lies near an unknown
    nodule must not be taught as background.
    """
    placed, misplaced = in_patient_space(records.labels, slices)
    rejected = [*records.rejected, *misplaced]
    by_series: dict[str, list[WeakLabel]] = {uid: [] for uid in records.series if uid in slices}
    for label in placed:
        by_series[label.series_uid].append(label)
    told = Counter(label.series_uid for label in records.labels)
    clean = {item.series_uid: item for item in records.clean}
    for uid, item in clean.items():
        if uid not in slices:
            expected = "a scan that is there"
            rejected.append(InputError(item.source, "seriesuid", expected, uid))
        elif told[uid]:
            rejected.append(InputError(item.source, "lobe", "no other record of the scan",
                                       f"{told[uid]} nodules"))  # fmt: skip
    usable = {}
    for uid, labels in by_series.items():
        if len(labels) == told[uid]:
            usable[uid] = tuple(labels)
        elif labels:
            got = f"{len(labels)} of {told[uid]} in {uid}"
            expected = "all records of the scan usable"
            rejected.append(InputError(labels[0].source, "seriesuid", expected, got))
    return usable, rejected
