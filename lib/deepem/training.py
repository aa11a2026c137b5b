"""Training of the detector, from labels to a published model that was judged on other patients."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import deepem
from deepem.fit import Materials, Progress, Run, TrainConfig, fit
from deepem.judging import by_nodules, by_records
from deepem.labelled import (
    LabelledStudy,
    WeakStudy,
    load_labelled,
    patient_hash,
    split_by_patient,
)
from deepem.model import ModelCard, fingerprint, load_model, publish
from deepem.network import pick_device
from deepem.patches import LabelledScan, PatchSampler
from deepem.rounds import Explained
from deepem.scan import ScanCache

logger = logging.getLogger(__name__)

_MOST_JUDGED_BY_RECORDS = 60
"""Patients; every validation looks at all of them."""


@dataclass(frozen=True)
class TrainResult:
    """How a training ended: ``published`` or not and why, and what was measured.

    explained: the weak labels of the last round of EM.
    """

    published: bool
    reason: str
    cpm: float
    served_cpm: float | None
    history: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)
    explained: list[Explained] = field(default_factory=list, repr=False)


def train(
    config: TrainConfig,
    labelled: Sequence[LabelledStudy],
    out: Path,
    *,
    weak: Sequence[WeakStudy] = (),
    validation: Sequence[LabelledStudy] | None = None,
    init: Path | None = None,
    served: Path | None = None,
    publish_to: Path | None = None,
    cache: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train on labelled scans and publish the model if it beats the one that is served.

    Published is to ``publish_to``, by default ``out/model.pt``.

    weak: scans with records, for EM (``config.em``); a scan that is labelled counts as such alone.
    validation: scans to be judged on; without it a share of the patients is held out, and where
    fewer than two patients have marked nodules, a share of those with records. init: model to start
    from (its network then counts, not ``config.preset``, and EM begins at once); where no step
    makes it better, nothing is published. served: the model
    to beat, by default the one that would be replaced. cache: of prepared scans, by default
    ``out/cache``; trainings on the same scans may share one. The averaged weights with the best
    validation CPM are the candidate; a tie keeps the served model.

    A run that was killed goes on from ``out/checkpoint.pt`` when it is started again with the same
    configuration and data, and with ``steps`` it ends exactly as if it had not been killed.
    Raises InputError or ValueError if there is nothing to train or to measure on.
    """
    report = on_progress or (lambda progress: None)
    device = pick_device(config.device)
    publish_to = publish_to or out / "model.pt"
    served = served or publish_to
    if config.em and init:
        config = replace(config, em=replace(config.em, warm_start=0.0))
    known = _patients_of(init) | _patients_of(served if served.exists() else None)
    roles = _Roles.given(config, labelled, weak, validation, known)
    total = len(roles.training) + len(roles.validation)
    started = time.monotonic()

    def on_done(count: int) -> None:
        spent = time.monotonic() - started
        left = spent * (total - count) / count
        report(Progress("preparing", count, total, 0, config.validate_times, spent, left,
                        math.nan, math.nan))  # fmt: skip

    prepared = ScanCache(cache or out / "cache")
    training, skipped = load_labelled(roles.training, prepared, lambda n, _: on_done(n))
    judged, skipped_too = load_labelled(
        roles.validation, prepared, lambda n, _: on_done(len(roles.training) + n)
    )
    scans = _Scans(training, roles.weak, judged, roles.judged_by_records)
    scans.check(config, init, skipped + skipped_too)
    data_fingerprint = scans.fingerprint()
    diameter_mm = [nodule.diameter_mm for scan in training for nodule in scan.nodules]
    run = Run.start(config, init, device, out / "checkpoint.pt", data_fingerprint, diameter_mm)
    strong = PatchSampler(training, run.network, config.patch, seed=config.seed)
    if scans.by_nodules:
        judge = partial(by_nodules, scans=judged, device=device)
    else:
        judge = partial(by_records, weak=roles.judged_by_records, cache=prepared, device=device)
    materials = Materials(strong if training else None, roles.weak, prepared, judge)
    fitted = fit(run, materials, out, report)

    served_cpm = None
    if served.exists():
        served_cpm = judge(load_model(served)[0].to(device)).cpm
    best = run.best
    result = TrainResult(
        published=best["step"] > 0 and best["cpm"] > max(served_cpm or 0.0, 0.0),
        reason=_verdict(best, served_cpm, scans),
        cpm=best["cpm"],
        served_cpm=served_cpm,
        history=run.history,
        skipped=skipped + skipped_too + fitted.skipped,
        explained=fitted.explained,
    )
    if result.published:
        publish(best["weights"], _card(run, init, scans, served_cpm), publish_to)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    logger.info(result.reason)
    return result


@dataclass(frozen=True)
class _Roles:
    """Who is trained on and who judges; nobody does both, whatever is known of them."""

    training: Sequence[LabelledStudy]
    weak: Sequence[WeakStudy]
    validation: Sequence[LabelledStudy]
    judged_by_records: Sequence[WeakStudy]

    @classmethod
    def given(
        cls,
        config: TrainConfig,
        labelled: Sequence[LabelledStudy],
        weak: Sequence[WeakStudy],
        validation: Sequence[LabelledStudy] | None,
        known: frozenset[str],
    ) -> _Roles:
        """Split by patient what is not split yet."""
        series = {item.study.series_uid for item in labelled}
        weak = [item for item in weak if item.study.series_uid not in series] if config.em else []
        marked = {item.study.patient_id for item in labelled if item.nodules}
        judged_by_records: Sequence[WeakStudy] = ()
        if validation is None and weak and len(marked) < 2:
            of_labelled = {item.study.patient_id for item in labelled}
            taken = [item for item in weak if item.study.patient_id in of_labelled]
            free = [item for item in weak if item.study.patient_id not in of_labelled]
            free, judged_by_records = split_by_patient(
                free, config.validation_share, config.seed, known,
                marked=lambda item: bool(item.labels), most=_MOST_JUDGED_BY_RECORDS,
            )  # fmt: skip
            weak = taken + free
            validation = ()
        elif validation is None:
            labelled, validation = split_by_patient(
                labelled, config.validation_share, config.seed, known,
                marked=lambda item: bool(item.nodules),
            )  # fmt: skip
        held_out = {item.study.patient_id for item in validation}
        weak = [item for item in weak if item.study.patient_id not in held_out]
        return cls(labelled, weak, validation, judged_by_records)


@dataclass(frozen=True)
class _Scans:
    """All that a training sees, in the roles of `_Roles`, marked scans prepared."""

    training: Sequence[LabelledScan]
    weak: Sequence[WeakStudy]
    judged: Sequence[LabelledScan]
    judged_by_records: Sequence[WeakStudy]

    @property
    def by_nodules(self) -> bool:
        """Whether marked nodules judge, else records."""
        return not self.judged_by_records

    @property
    def judges(self) -> str:
        """The scans that judge, in words."""
        if self.by_nodules:
            return f"{len(self.judged)} validation scans"
        return f"the records of {len(self.judged_by_records)} validation scans"

    def check(self, config: TrainConfig, init: Path | None, skipped: list[str]) -> None:
        """ValueError if there is nothing to train on, to start EM from, or to measure on."""
        with_nodules = [scan for scan in self.training if scan.nodules]
        reason = f"got none in {len(self.training)}; skipped: {skipped}"
        if not with_nodules and not (init and self.weak):
            wanted = "expected at least one nodule in a readable scan"
            if config.em:
                wanted += ", or weak labels and a model to start from"
            raise ValueError(f"training scans: {wanted}, {reason}")
        if config.em and not self.weak:
            raise ValueError(
                "weak labels: expected at least one scan that is neither marked nor of a patient "
                "of the validation scans, got none"
            )
        if self.by_nodules and not any(scan.nodules for scan in self.judged):
            raise ValueError("validation scans: expected at least one nodule in a readable scan, "
                             f"got none in {len(self.judged)}; skipped: {skipped}")  # fmt: skip

    def fingerprint(self) -> str:
        """Hash of every label and of every image; of scans with records alone only its size."""
        digest = hashlib.blake2b(digest_size=16)
        for scans in (self.training, self.judged):
            for item in sorted(scans, key=lambda item: item.scan.series_uid):
                scan = item.scan
                digest.update(repr((scan.series_uid, scan.fingerprint, item.nodules)).encode())
            digest.update(b"/")
        for weak in (self.weak, self.judged_by_records):
            for study in sorted(weak, key=lambda item: item.study.series_uid):
                labels = [replace(label, source="") for label in study.labels]
                content = (study.study.series_uid, study.study.size_bytes, labels)
                digest.update(repr(content).encode())
            digest.update(b"/")
        return digest.hexdigest()


def _card(run: Run, init: Path | None, scans: _Scans, served_cpm: float | None) -> ModelCard:
    """All that was measured on the best weights of a run, and what they were made of."""
    patients = {patient_hash(scan.patient_id) for scan in scans.training} | _patients_of(init)
    patients |= {patient_hash(item.study.patient_id) for item in scans.weak}
    by_what = "marked nodules" if scans.by_nodules else "records alone"
    return ModelCard(
        network=run.network.config,
        training={
            **asdict(run.config),
            "steps": run.step,
            "minutes_measured": round(run.elapsed_s / 60, 2),
            "device_type": run.device.type,
            "init": load_model(init)[1].weights_fingerprint if init else None,
        },
        data={
            "training_scans": len(scans.training),
            "training_nodules": sum(len(scan.nodules) for scan in scans.training),
            "weak_scans": len(scans.weak),
            "weak_labels": sum(len(item.labels) for item in scans.weak),
            "training_patients": sorted(patients),
            "validation_scans": len(scans.judged) + len(scans.judged_by_records),
        },
        data_fingerprint=scans.fingerprint(),
        metrics={
            "judged_on": f"{by_what} of held-out validation scans, also used to choose the step",
            "scans": len(scans.judged) + len(scans.judged_by_records),
            "nodules": sum(len(scan.nodules) for scan in scans.judged)
            + sum(len(item.labels) for item in scans.judged_by_records),
            "cpm": run.best["cpm"],
            "fp_per_scan": run.best["fp_per_scan"],
            "sensitivity": run.best["sensitivity"],
            "served_cpm": served_cpm,
        },
        history=run.history,
        weights_fingerprint=fingerprint(run.best["weights"]),
        created_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        deepem_version=deepem.__version__,
    )


def _patients_of(model: Path | None) -> frozenset[str]:
    """Hashes of the patients that a model was trained on, its own start included."""
    return frozenset(load_model(model)[1].data["training_patients"]) if model else frozenset()


def _verdict(best: dict[str, Any], served_cpm: float | None, scans: _Scans) -> str:
    cpm = best["cpm"]
    measured = f"CPM {cpm:.3f} on {scans.judges}"
    if cpm <= 0:
        return f"not published: {measured}, nothing was found"
    if best["step"] == 0:
        return f"not published: {measured} before the first step, nothing better after it"
    if served_cpm is None:
        return f"published: {measured}, no model was served before"
    better = "published" if cpm > served_cpm else "not published"
    return f"{better}: {measured}, the served model has {served_cpm:.3f}"
