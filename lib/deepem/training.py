"""Supervised training of the detector (Eq. 1 of Zhu et al. 2018), resumable, judged on others."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

import deepem
from deepem.detector import propose
from deepem.files import atomic_path
from deepem.froc import Froc, evaluate
from deepem.labelled import LabelledStudy, load_labelled, patient_hash, split_by_patient
from deepem.model import ModelCard, fingerprint, load_model, publish
from deepem.network import PRESETS, VALUES_PER_ANCHOR, NoduleNet, mixed_precision, pick_device
from deepem.patches import LabelledScan, Patch, PatchSampler
from deepem.scan import ScanCache

logger = logging.getLogger(__name__)

_CHECKPOINT_EVERY_S = 30.0
_EMA_DECAY = 0.998
_MIN_PATCH = 48
"""On maps of 2^3, the deepest of a 32^3 patch, oneDNN's bfloat16 weight gradients are wrong."""


@dataclass(frozen=True)
class TrainConfig:
    """One training. ``steps`` or ``minutes`` ends it; the learning rate falls to zero by then.

    patch: edge of the cubic patches in voxels (mm). negative_pool, hard_negatives: of that many
    random negatives of a patch the hardest few are kept (the authors' code: 800 and 2).
    validate_times: how often the detector is measured on the way. validation_share: of the
    patients, when no validation scans are named.
    """

    preset: str = "slim"
    steps: int | None = 4000
    minutes: float | None = None
    seed: int = 0
    device: str = "auto"
    batch: int = 4
    patch: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4
    negative_pool: int = 800
    hard_negatives: int = 2
    validate_times: int = 8
    validation_share: float = 0.2

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"preset: expected one of {sorted(PRESETS)}, got {self.preset!r}")
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"steps or minutes: expected exactly one, got {self.steps} and {self.minutes}"
            )
        for name in ("steps", "minutes", "batch", "learning_rate", "validate_times"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected more than 0, got {value}")
        if self.patch % 16 or self.patch < _MIN_PATCH:
            raise ValueError(
                f"patch: expected a multiple of 16 from {_MIN_PATCH} on, got {self.patch}"
            )
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share: expected 0..1, got {self.validation_share}")


@dataclass(frozen=True)
class Progress:
    """Where a training is. ``stage`` is preparing, training or validating."""

    stage: str
    step: int
    steps: int
    epoch: int
    epochs: int
    elapsed_s: float
    eta_s: float
    loss: float
    best_cpm: float


@dataclass(frozen=True)
class TrainResult:
    """How a training ended: ``published`` or not and why, and what was measured."""

    published: bool
    reason: str
    cpm: float
    served_cpm: float | None
    history: list[dict[str, Any]]
    skipped: list[str] = field(default_factory=list)


def measure(network: NoduleNet, scans: Sequence[LabelledScan], device: torch.device) -> Froc:
    """FROC of a network on labelled scans, by the rules of LUNA16."""
    network.eval()
    return evaluate(
        annotations={item.scan.series_uid: list(item.nodules) for item in scans},
        predictions={item.scan.series_uid: propose(network, item.scan, device) for item in scans},
        series=[item.scan.series_uid for item in scans],
    )


def detection_loss(
    maps: Tensor, patches: Sequence[Patch], config: TrainConfig, step: int
) -> Tensor:
    """Half the positives' and half the hard negatives' cross-entropy, plus smooth L1 of the boxes.

    maps: (B, A * 5, I, J, K). The negatives that count are, in every patch, the ``hard_negatives``
    with the highest logit of ``negative_pool`` drawn at random.
    """
    values = maps.unflatten(1, (-1, VALUES_PER_ANCHOR)).movedim(2, -1).flatten(1, 4)  # (B, N, 5)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    positive, regression, wanted, negative = [], [], [], []
    for row, patch in zip(values, patches, strict=True):
        targets = patch.targets
        pool = targets.negative
        drawn = pool[torch.randperm(len(pool), generator=generator)[: config.negative_pool]]
        negative.append(row[drawn.to(row.device), 0].topk(config.hard_negatives).values)
        chosen = row[targets.positive.to(row.device)]
        positive.append(chosen[:, 0])
        regression.append(chosen[:, 1:])
        wanted.append(targets.regression.to(row.device))
    negatives = torch.cat(negative)
    loss = 0.5 * functional.softplus(negatives).mean()
    if any(len(part) for part in positive):
        loss = loss + 0.5 * functional.softplus(-torch.cat(positive)).mean()
        difference = functional.smooth_l1_loss(
            torch.cat(regression), torch.cat(wanted), reduction="none"
        )
        loss = loss + difference.sum(1).mean()
    return loss


def train(
    config: TrainConfig,
    labelled: Sequence[LabelledStudy],
    out: Path,
    *,
    validation: Sequence[LabelledStudy] | None = None,
    init: Path | None = None,
    served: Path | None = None,
    publish_to: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train on labelled scans and publish the model if it beats the one that is served.

    Published is to ``publish_to``, by default ``out/model.pt``.

    validation: scans to be judged on; without it a share of the patients is held out. init: model
    to start from (its network then counts, not ``config.preset``). served: the model to beat, by
    default the one that would be replaced. The averaged weights with the best validation CPM are
    the candidate; a tie keeps the served model.

    A run that was killed goes on from ``out/checkpoint.pt`` when it is started again with the same
    configuration and data, and with ``steps`` it ends exactly as if it had not been killed.
    Raises InputError or ValueError if there is nothing to train or to measure on.
    """
    report = on_progress or (lambda progress: None)
    device = pick_device(config.device)
    publish_to = publish_to or out / "model.pt"
    served = served or publish_to
    if validation is None:
        known = _patients_of(init) | _patients_of(served if served.exists() else None)
        labelled, validation = split_by_patient(
            labelled, config.validation_share, config.seed, known
        )
    total = len(labelled) + len(validation)
    started = time.monotonic()

    def on_done(count: int, offset: int) -> None:
        spent = time.monotonic() - started
        left = spent * (total - count - offset) / (count + offset)
        report(Progress("preparing", count + offset, total, 0, config.validate_times, spent, left,
                        math.nan, math.nan))  # fmt: skip

    cache = ScanCache(out / "cache")
    training, skipped = load_labelled(labelled, cache, lambda n, _: on_done(n, 0))
    judged, skipped_too = load_labelled(validation, cache, lambda n, _: on_done(n, len(labelled)))
    for name, scans in (("training", training), ("validation", judged)):
        if not any(scan.nodules for scan in scans):
            raise ValueError(f"{name} scans: expected at least one nodule in a readable scan, got "
                             f"none in {len(scans)}; skipped: {skipped + skipped_too}")  # fmt: skip

    data_fingerprint = _fingerprint_of(training, judged)
    run = _Run.start(config, init, device, out / "checkpoint.pt", data_fingerprint)
    sampler = PatchSampler(training, run.network, config.patch, seed=config.seed)
    _fit(run, sampler, judged, out / "tensorboard", report)

    served_cpm = None
    if served.exists():
        served_cpm = measure(load_model(served)[0].to(device), judged, device).cpm
    best = run.best
    result = TrainResult(
        published=best["cpm"] > max(served_cpm or 0.0, 0.0),
        reason=_verdict(best["cpm"], served_cpm, len(judged)),
        cpm=best["cpm"],
        served_cpm=served_cpm,
        history=run.history,
        skipped=skipped + skipped_too,
    )
    if result.published:
        card = _card(run, init, training, judged, data_fingerprint, served_cpm)
        publish(best["weights"], card, publish_to)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    logger.info(result.reason)
    return result


def _card(
    run: _Run,
    init: Path | None,
    training: Sequence[LabelledScan],
    judged: Sequence[LabelledScan],
    data_fingerprint: str,
    served_cpm: float | None,
) -> ModelCard:
    """All that was measured on the best weights of a run, and what they were made of."""
    patients = {patient_hash(scan.patient_id) for scan in training} | _patients_of(init)
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
            "training_scans": len(training),
            "training_nodules": sum(len(scan.nodules) for scan in training),
            "training_patients": sorted(patients),
            "validation_scans": len(judged),
        },
        data_fingerprint=data_fingerprint,
        metrics={
            "judged_on": "held-out validation scans, also used to choose the step",
            "scans": len(judged),
            "nodules": sum(len(scan.nodules) for scan in judged),
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


def _verdict(cpm: float, served_cpm: float | None, scans: int) -> str:
    measured = f"CPM {cpm:.3f} on {scans} validation scans"
    if cpm <= 0:
        return f"not published: {measured}, nothing was found"
    if served_cpm is None:
        return f"published: {measured}, no model was served before"
    better = "published" if cpm > served_cpm else "not published"
    return f"{better}: {measured}, the served model has {served_cpm:.3f}"


def _fingerprint_of(*groups: Sequence[LabelledScan]) -> str:
    """Hash of every image and label, in the order of the series."""
    digest = hashlib.blake2b(digest_size=16)
    for scans in groups:
        for item in sorted(scans, key=lambda item: item.scan.series_uid):
            digest.update(item.scan.series_uid.encode())
            digest.update(item.scan.image.tobytes())
            digest.update(repr(item.nodules).encode())
        digest.update(b"/")
    return digest.hexdigest()


class _Run:
    """Everything that a training changes, so that it can be put away and taken up again."""

    def __init__(self, config: TrainConfig, network: NoduleNet, device: torch.device, file: Path,
                 key: str):  # fmt: skip
        self.config = config
        self.device = device
        self.network = network.to(device)
        self.averaged = AveragedModel(self.network, avg_fn=_moving_average, use_buffers=True)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step = 0
        self.elapsed_s = 0.0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"cpm": -1.0}
        self._file = file
        self._key = key

    @classmethod
    def start(cls, config: TrainConfig, init: Path | None, device: torch.device, file: Path,
              data_fingerprint: str) -> _Run:  # fmt: skip
        torch.manual_seed(config.seed)
        network = load_model(init)[0] if init else NoduleNet(PRESETS[config.preset])
        start = fingerprint(network.state_dict())
        run = cls(config, network, device, file, repr((config, data_fingerprint, start)))
        if file.exists():
            run._resume()
        return run

    @property
    def fraction(self) -> float:
        """Of the training that is done, 0..1."""
        if self.config.steps is not None:
            return min(self.step / self.config.steps, 1.0)
        assert self.config.minutes is not None
        return min(self.elapsed_s / (60 * self.config.minutes), 1.0)

    def save(self) -> None:
        content = {
            "key": self._key,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "history": self.history,
            "best": self.best,
        }
        with atomic_path(self._file) as part:
            torch.save(content, part)

    def _resume(self) -> None:
        content = torch.load(self._file, map_location=self.device, weights_only=True)
        if content["key"] != self._key:
            logger.warning(
                "%s is of another configuration or other data: starting anew", self._file
            )
            return
        self.network.load_state_dict(content["network"])
        self.averaged.load_state_dict(content["averaged"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.elapsed_s = content["step"], content["elapsed_s"]
        self.history, self.best = content["history"], content["best"]
        logger.info("going on from step %d", self.step)


def _moving_average(average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    """Exponential average whose memory grows with the run, so that short runs are averaged too."""
    decay = min(_EMA_DECAY, (1 + int(count)) / (10 + int(count)))
    return average + (1 - decay) * (current - average)


def _learning_rate(config: TrainConfig, fraction: float) -> float:
    """A short linear rise, then a cosine to zero."""
    rise = min(fraction / 0.03, 1.0) if fraction > 0 else 0.01
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * fraction))


def _fit(
    run: _Run,
    sampler: PatchSampler,
    judged: Sequence[LabelledScan],
    tensorboard: Path,
    report: Callable[[Progress], None],
) -> None:
    """The optimiser loop, from where ``run`` is to its end."""
    config = run.config
    writer = SummaryWriter(str(tensorboard), purge_step=run.step)
    clock = time.monotonic()
    saved = clock
    losses: list[float] = []

    def tell(stage: str) -> None:
        fraction = run.fraction
        eta_s = run.elapsed_s * (1 - fraction) / fraction if fraction else math.nan
        steps = config.steps or round(run.step / fraction if fraction else 0)
        report(Progress(stage, run.step, steps, len(run.history), config.validate_times,
                        run.elapsed_s, eta_s, float(np.mean(losses[-50:])) if losses else math.nan,
                        max(run.best["cpm"], 0.0)))  # fmt: skip

    with ThreadPoolExecutor(2, "patches") as pool:
        ahead = [pool.submit(sampler.batch, run.step + at, config.batch) for at in range(3)]
        while run.fraction < 1:
            patches = ahead.pop(0).result()
            ahead.append(pool.submit(sampler.batch, run.step + 3, config.batch))
            losses.append(_train_step(run, patches))
            run.step += 1
            now = time.monotonic()
            run.elapsed_s += now - clock
            clock = now
            if run.step % 10 == 0:
                writer.add_scalar("loss", np.mean(losses[-10:]), run.step)
                writer.add_scalar("learning_rate", run.optimizer.param_groups[0]["lr"], run.step)
                tell("training")
            if run.fraction >= (len(run.history) + 1) / config.validate_times:
                tell("validating")
                _validate(run, judged, float(np.mean(losses)), writer)
                losses.clear()
                tell("training")
                run.save()
            elif now - saved > _CHECKPOINT_EVERY_S:
                run.save()
                saved = now
    writer.close()


def _train_step(run: _Run, patches: list[Patch]) -> float:
    run.network.train()
    for group in run.optimizer.param_groups:
        group["lr"] = _learning_rate(run.config, run.fraction)
    x = torch.stack([patch.x for patch in patches]).to(run.device)
    with mixed_precision(run.device):
        maps = run.network(x.contiguous(memory_format=torch.channels_last_3d))
    loss = detection_loss(maps, patches, run.config, run.step)
    run.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(run.network.parameters(), 10.0)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"step {run.step}: the gradient is {float(norm)}; "
                                 "a lower learning rate may help")  # fmt: skip
    run.optimizer.step()
    run.averaged.update_parameters(run.network)
    return float(loss.detach())


def _validate(
    run: _Run, judged: Sequence[LabelledScan], loss: float, writer: SummaryWriter
) -> None:
    averaged = cast(NoduleNet, run.averaged.module)
    froc = measure(averaged, judged, run.device)
    sensitivity = [round(float(value), 6) for value in froc.sensitivity]
    run.history.append({
        "step": run.step,
        "minutes": round(run.elapsed_s / 60, 3),
        "loss": round(loss, 5),
        "cpm": round(float(froc.cpm), 6),
        "sensitivity": sensitivity,
    })  # fmt: skip
    writer.add_scalar("validation/cpm", froc.cpm, run.step)
    for rate, value in zip(froc.fp_per_scan, sensitivity, strict=True):
        writer.add_scalar(f"validation/sensitivity_at_{rate:g}_fp", value, run.step)
    logger.info("step %d: loss %.4f, validation CPM %.3f", run.step, loss, froc.cpm)
    if froc.cpm > run.best["cpm"]:
        run.best = {
            "cpm": float(froc.cpm),
            "sensitivity": sensitivity,
            "fp_per_scan": [float(rate) for rate in froc.fp_per_scan],
            "weights": {
                name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, tensor in averaged.state_dict().items()
            },
        }
