"""The resumable loop: phases of training steps, a round of EM before some of them."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel
from torch.utils.tensorboard import SummaryWriter

from deepem.em import EmConfig
from deepem.errors import InputError
from deepem.files import atomic_path, write_json
from deepem.froc import Froc
from deepem.labelled import WeakStudy
from deepem.model import fingerprint, load_model
from deepem.network import PRESETS, VALUES_PER_ANCHOR, NoduleNet, fused, mixed_precision
from deepem.observation import ObservationModel, SizeModel
from deepem.patches import LabelledScan, Patch, PatchSampler
from deepem.rounds import (
    Explained,
    details,
    drawn,
    explain_all,
    first_model,
    propose_all,
    refitted,
    summary,
    taught,
    to_rows,
)
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
    validate_times: how often the detector is measured on the way; with ``em``, beside the end of
    every round, on the way to the first. validation_share: of the patients, when no validation
    scans are named. em: None trains on strong labels alone.
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
    em: EmConfig | None = None

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
    """Where a training is. ``stage`` is preparing, training, e-step or validating."""

    stage: str
    step: int
    steps: int
    epoch: int
    epochs: int
    elapsed_s: float
    eta_s: float
    loss: float
    best_cpm: float


def detection_loss(
    maps: Tensor, patches: Sequence[Patch], config: TrainConfig, step: int
) -> Tensor:
    """Half the positives' and half the hard negatives' cross-entropy, plus smooth L1 of the boxes.

    maps: (B, A * 5, I, J, K). The negatives that count are, in every patch, the ``hard_negatives``
    with the highest logit of ``negative_pool`` drawn at random. A positive counts by its weight,
    and by its doubt as a negative.
    """
    values = maps.unflatten(1, (-1, VALUES_PER_ANCHOR)).movedim(2, -1).flatten(1, 4)  # (B, N, 5)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
    positive, regression, wanted, weights, doubts, negative = [], [], [], [], [], []
    for row, patch in zip(values, patches, strict=True):
        targets = patch.targets
        pool = targets.negative
        drawn = pool[torch.randperm(len(pool), generator=generator)[: config.negative_pool]]
        hardest = min(config.hard_negatives, len(drawn))
        negative.append(row[drawn.to(row.device), 0].topk(hardest).values)
        chosen = row[targets.positive.to(row.device)]
        positive.append(chosen[:, 0])
        regression.append(chosen[:, 1:])
        wanted.append(targets.regression.to(row.device))
        weights.append(targets.weight.to(row.device))
        doubts.append(targets.doubt.to(row.device))
    logit, weight, doubt = torch.cat(positive), torch.cat(weights), torch.cat(doubts)
    difference = functional.smooth_l1_loss(
        torch.cat(regression), torch.cat(wanted), reduction="none"
    )
    negatives = torch.cat([*negative, logit])
    against = torch.cat([torch.ones(len(negatives) - len(logit), device=logit.device), doubt])
    return (
        0.5 * _weighted_mean(functional.softplus(negatives), against)
        + 0.5 * _weighted_mean(functional.softplus(-logit), weight)
        + _weighted_mean(difference.sum(1), weight)
    )


def _weighted_mean(values: Tensor, weight: Tensor) -> Tensor:
    """0 without values; less than one value's worth of weight is not made more of."""
    return (weight * values).sum() / weight.sum().clamp(min=1.0)


class Run:
    """Everything that a training changes, so that it can be put away and taken up again.

    phase: the one it is in. round: of EM, the last one that was begun, 0 before the first;
    proposals: of its E-step so far, `to_rows` by series; model: p(record | nodule) in this round.
    best: the averaged weights with the best validation CPM so far, those it started from included.
    """

    def __init__(self, config: TrainConfig, network: NoduleNet, device: torch.device, file: Path,
                 key: str, from_scratch: bool):  # fmt: skip
        self.config = config
        self.from_scratch = from_scratch
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
        self.phase = 0
        self.round = 0
        self.proposals: dict[str, list[list[float]]] = {}
        self.model: ObservationModel | None = None
        self._file = file
        self._key = key

    @classmethod
    def start(cls, config: TrainConfig, init: Path | None, device: torch.device, file: Path,
              data_fingerprint: str, diameter_mm: Sequence[float] = ()) -> Run:  # fmt: skip
        """A new run, or the one that ``file`` holds if it has the same configuration and data.

        diameter_mm: of the marked nodules, for `first_model`.
        """
        torch.manual_seed(config.seed)
        network = load_model(init)[0] if init else NoduleNet(PRESETS[config.preset])
        start = fingerprint(network.state_dict())
        key = repr((config, data_fingerprint, start))
        run = cls(config, network, device, file, key, from_scratch=init is None)
        if config.em:
            run.model = first_model(config.em, diameter_mm)
        if file.exists():
            run._resume()
        return run

    @property
    def newest(self) -> NoduleNet:
        """The network with averaged weights, as they are now."""
        return cast(NoduleNet, self.averaged.module)

    def best_network(self) -> NoduleNet:
        """A copy of the network with the best weights so far, the newest before any are known."""
        network = copy.deepcopy(self.newest)
        if "weights" in self.best:
            network.load_state_dict(self.best["weights"])
        return network

    @property
    def fraction(self) -> float:
        """Of the training that is done, 0..1."""
        if self.config.steps is not None:
            return min(self.step / self.config.steps, 1.0)
        assert self.config.minutes is not None
        return min(self.elapsed_s / (60 * self.config.minutes), 1.0)

    def save(self) -> None:
        """Put everything away in one step."""
        content = {
            "key": self._key,
            "network": self.network.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "elapsed_s": self.elapsed_s,
            "history": self.history,
            "best": self.best,
            "phase": self.phase,
            "round": self.round,
            "proposals": self.proposals,
            "model": _stored(self.model),
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
        self.phase, self.round, self.proposals = (
            content["phase"], content["round"], content["proposals"],
        )  # fmt: skip
        self.model = _restored(self.model, content["model"])
        logger.info("going on from step %d", self.step)


@dataclass(frozen=True)
class _Phase:
    """A part of the training that ends with a validation; ``round`` 0 has no E-step before it."""

    end: float
    round: int


def _phases(config: TrainConfig) -> list[_Phase]:
    if config.em is None:
        return [_Phase((at + 1) / config.validate_times, 0) for at in range(config.validate_times)]
    warm, rounds = config.em.warm_start, config.em.rounds
    parts = math.ceil(warm * config.validate_times)
    before = [_Phase(warm * (at + 1) / parts, 0) for at in range(parts)]
    return before + [_Phase(warm + (1 - warm) * at / rounds, at) for at in range(1, rounds + 1)]


@dataclass(frozen=True, eq=False)
class Materials:
    """What a training works on.

    strong: patches of marked scans, None without any. weak: scans with records alone. judge: FROC
    of a network on scans that are neither.
    """

    strong: PatchSampler | None
    weak: Sequence[WeakStudy]
    cache: ScanCache
    judge: Callable[[NoduleNet], Froc]


@dataclass(frozen=True)
class FitResult:
    """What a finished loop leaves beside ``run``: its last round of EM, and what was left out."""

    explained: list[Explained]
    skipped: list[str]


def fit(run: Run, materials: Materials, out: Path, report: Callable[[Progress], None]) -> FitResult:
    """The optimiser loop, from where ``run`` is to its end.

    Every round of EM writes ``out/rounds/NN.json``: all labels with posteriors and proposals.
    """
    phases = _phases(run.config)
    loop = _Loop(run, out, report, len(phases) + (not run.from_scratch))
    if not run.from_scratch and not run.history:
        loop.validate(materials.judge, 0, [])
        run.save()
    explained: list[Explained] = []
    while run.phase < len(phases):
        phase = phases[run.phase]
        weak = None
        if phase.round and run.config.em:
            half_time = (run.fraction + phase.end) / 2
            explained = loop.e_step(phase.round, materials, run.config.em, half_time)
            weak = _sampler(run, [taught(item, run.config.em) for item in explained])
        loop.train(_batches(run.config, materials.strong, weak), phase.end)
        loop.validate(materials.judge, phase.round, explained)
        run.phase = next(
            (at for at, one in enumerate(phases) if one.end > run.fraction), len(phases)
        )
        run.save()
    loop.writer.close()
    return FitResult(explained, loop.skipped)


def _sampler(run: Run, scans: Sequence[LabelledScan]) -> PatchSampler | None:
    """Patches of weak scans; the seed differs from that of the strong ones."""
    if not scans:
        return None
    return PatchSampler(scans, run.network, run.config.patch, seed=run.config.seed + 1_000_003)


def _batches(
    config: TrainConfig, strong: PatchSampler | None, weak: PatchSampler | None
) -> Callable[[int], list[Patch]]:
    """The patches of a step: the weak step and the strong pass of Algorithm 1, in every batch.

    Both in one batch, since batch norm and the falling learning rate should see both alike.
    """
    share = config.em.weak_share if config.em else 0.0
    if weak is None or strong is None:
        only = strong or weak
        if only is None:
            raise ValueError("training: expected scans to train on, got none that can be read")
        return lambda step: only.batch(step, config.batch)
    of_weak = min(max(round(share * config.batch), 1), config.batch - 1)
    return lambda step: strong.batch(step, config.batch - of_weak) + weak.batch(step, of_weak)


class _Loop:
    """A run with what it reports to: progress, TensorBoard, the checkpoint's clock."""

    def __init__(self, run: Run, out: Path, report: Callable[[Progress], None], phases: int):
        self.run = run
        self.writer = SummaryWriter(str(out / "tensorboard"), purge_step=run.step)
        self.skipped: list[str] = []
        self._out = out
        self._report = report
        self._phases = phases
        self._clock = self._saved = time.monotonic()
        self._losses: list[float] = []

    def train(self, batches: Callable[[int], list[Patch]], end: float) -> None:
        """Steps until the fraction ``end`` of the training is done."""
        run = self.run
        with ThreadPoolExecutor(2, "patches") as pool:
            ahead = [pool.submit(batches, run.step + at) for at in range(3)]
            while run.fraction < end:
                patches = ahead.pop(0).result()
                ahead.append(pool.submit(batches, run.step + 3))
                self._losses.append(_train_step(run, patches))
                run.step += 1
                self._tick()
                if run.step % 10 == 0:
                    rate = run.optimizer.param_groups[0]["lr"]
                    self.writer.add_scalar("loss", np.mean(self._losses[-10:]), run.step)
                    self.writer.add_scalar("learning_rate", rate, run.step)
                    self._tell("training")
            for future in ahead:
                future.cancel()

    def e_step(
        self, number: int, materials: Materials, config: EmConfig, half_time: float
    ) -> list[Explained]:
        """Round ``number`` on a random share of the weak scans; takes up an interrupted one.

        Where minutes count, it ends at the fraction ``half_time`` with the scans that it has.
        """
        run, cache, seed = self.run, materials.cache, self.run.config.seed
        assert run.model is not None
        if run.round != number:
            if run.round:
                before = explain_all(
                    materials.weak, run.proposals, cache, run.model, config, seed, run.round
                )
                run.model = refitted(run.model, before)
            run.round, run.proposals = number, {}
            run.save()
        weak = drawn(materials.weak, config, seed, number)
        missing = [item for item in weak if item.study.series_uid not in run.proposals]
        teacher = run.best_network() if config.best_proposes else copy.deepcopy(run.newest)
        found = propose_all(fused(teacher), missing, cache, run.device, config.min_logit)
        for done, (item, proposals) in enumerate(found, len(weak) - len(missing) + 1):
            if isinstance(proposals, InputError):
                logger.warning("skipped: %s", proposals)
                self.skipped.append(str(proposals))
            else:
                run.proposals[item.study.series_uid] = to_rows(proposals)
            self._tick()
            self._tell(f"e-step {number} of {config.rounds}, scan {done} of {len(weak)}")
            if run.config.minutes and run.fraction > half_time:
                logger.warning("e-step %d: time for %d of %d scans", number, done, len(weak))
                break
        explained = explain_all(weak, run.proposals, cache, run.model, config, seed, number)
        write_json(self._out / "rounds" / f"{number:02d}.json",
                   {"round": number, "step": run.step, "scans": details(explained)})  # fmt: skip
        return explained

    def validate(
        self, judge: Callable[[NoduleNet], Froc], number: int, explained: Sequence[Explained]
    ) -> None:
        """Measure the averaged weights; keep them if they are the best so far."""
        run = self.run
        self._tell("validating")
        loss = float(np.mean(self._losses)) if self._losses else math.nan
        froc = judge(run.newest)
        sensitivity = [round(float(value), 6) for value in froc.sensitivity]
        entry: dict[str, Any] = {
            "step": run.step,
            "minutes": round(run.elapsed_s / 60, 3),
            "loss": None if math.isnan(loss) else round(loss, 5),
            "cpm": round(float(froc.cpm), 6),
            "sensitivity": sensitivity,
        }
        if number and run.model:
            entry["em"] = {"round": number, **summary(explained, run.model)}
            for name, value in entry["em"].items():
                if value is not None:
                    self.writer.add_scalar(f"em/{name}", value, run.step)
            logger.info("round %d: %s", number, entry["em"])
        run.history.append(entry)
        self.writer.add_scalar("validation/cpm", froc.cpm, run.step)
        for rate, value in zip(froc.fp_per_scan, sensitivity, strict=True):
            self.writer.add_scalar(f"validation/sensitivity_at_{rate:g}_fp", value, run.step)
        logger.info("step %d: loss %.4f, validation CPM %.3f", run.step, loss, froc.cpm)
        if froc.cpm > run.best["cpm"]:
            run.best = {
                "step": run.step,
                "cpm": float(froc.cpm),
                "sensitivity": sensitivity,
                "fp_per_scan": [float(rate) for rate in froc.fp_per_scan],
                "weights": {
                    name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
                    for name, tensor in run.newest.state_dict().items()
                },
            }
        self._losses.clear()
        self._tell("training")

    def _tick(self) -> None:
        """Count the time, and put the run away now and then."""
        now = time.monotonic()
        self.run.elapsed_s += now - self._clock
        self._clock = now
        if now - self._saved > _CHECKPOINT_EVERY_S:
            self.run.save()
            self._saved = now

    def _tell(self, stage: str) -> None:
        run = self.run
        fraction = run.fraction
        eta_s = run.elapsed_s * (1 - fraction) / fraction if fraction else math.nan
        steps = run.config.steps or round(run.step / fraction if fraction else 0)
        loss = float(np.mean(self._losses[-50:])) if self._losses else math.nan
        self._report(Progress(stage, run.step, steps, len(run.history), self._phases,
                              run.elapsed_s, eta_s, loss, max(run.best["cpm"], 0.0)))  # fmt: skip


def _stored(model: ObservationModel | None) -> dict[str, list[Any]] | None:
    """What is learned of p(record | nodule), in plain lists."""
    if model is None:
        return None
    size = [model.size.log_bias, model.size.spread] if model.size else []
    return {"lobe": [model.lobe.weights.tolist(), model.lobe.bias.tolist()], "size": size}


def _restored(
    model: ObservationModel | None, stored: dict[str, list[Any]] | None
) -> ObservationModel | None:
    if model is None or stored is None:
        return None
    weights, bias = map(np.array, stored["lobe"])
    size = SizeModel(*stored["size"]) if stored["size"] else None
    return replace(model, lobe=replace(model.lobe, weights=weights, bias=bias), size=size)


def _moving_average(average: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
    """Exponential average whose memory grows with the run, so that short runs are averaged too."""
    decay = min(_EMA_DECAY, (1 + int(count)) / (10 + int(count)))
    return average + (1 - decay) * (current - average)


def _learning_rate(config: TrainConfig, fraction: float) -> float:
    """A short linear rise, then a cosine to zero."""
    rise = min(fraction / 0.03, 1.0) if fraction > 0 else 0.01
    return config.learning_rate * rise * 0.5 * (1 + math.cos(math.pi * fraction))


def _train_step(run: Run, patches: list[Patch]) -> float:
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
