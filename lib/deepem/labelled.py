"""Scans with labels: who is trained on, who is held out, and what of it can be read."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from deepem.errors import InputError
from deepem.nodule import Nodule
from deepem.patches import LabelledScan
from deepem.scan import ScanCache
from deepem.volume import Study

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledStudy:
    """A scan on disk with all of its nodules; none means that a reader found it clean."""

    study: Study
    nodules: tuple[Nodule, ...]


def patient_hash(patient_id: str) -> str:
    """What a model card says of a patient: enough to know them again, no name."""
    return hashlib.blake2b(patient_id.encode(), digest_size=8).hexdigest()


def split_by_patient(
    labelled: Sequence[LabelledStudy],
    share: float,
    seed: int,
    known: frozenset[str] = frozenset(),
) -> tuple[list[LabelledStudy], list[LabelledStudy]]:
    """(training, validation) without a patient in both.

    Patients are ordered by a hash, so that a scan that arrives later moves few others. Both sides
    get at least one patient with a nodule. known: `patient_hash` of patients that the model to
    start from or to beat was trained on; they are held out only if nobody else is there, since a
    model looks better than it is on scans that it knows.
    ValueError when fewer than two patients have nodules.
    """

    def rank(patient: str) -> tuple[bool, str]:
        order = hashlib.blake2b(f"{seed}/{patient}".encode()).hexdigest()
        return patient_hash(patient) in known, order

    patients = sorted({item.study.patient_id for item in labelled}, key=rank)
    marked = {item.study.patient_id for item in labelled if item.nodules}
    if len(marked) < 2:
        raise ValueError(
            "labels: expected nodules in scans of at least 2 patients (one to train on, one to "
            f"measure on), got {len(marked)} of {len(patients)}"
        )
    held_out = set(patients[: max(1, round(share * len(patients)))])
    in_order = [patient for patient in patients if patient in marked]
    if not held_out & marked:
        held_out.add(in_order[0])
    if marked <= held_out:
        held_out.discard(in_order[-1])
    return (
        [item for item in labelled if item.study.patient_id not in held_out],
        [item for item in labelled if item.study.patient_id in held_out],
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
