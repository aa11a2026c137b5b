"""Training patches: where to cut, how to vary them, and what they teach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.transforms import (
    Compose,
    RandGaussianNoise,
    RandGaussianSmooth,
    RandScaleIntensity,
    RandShiftIntensity,
)
from torch import Tensor

from deepem.boxes import Targets, assign
from deepem.detector import network_input
from deepem.network import OUTPUT_STRIDE, NoduleNet
from deepem.nodule import Nodule
from deepem.scan import Scan

_RANDOM_SHARE = 0.3
"""Of the crops; the others show a nodule (the authors' code)."""

_BORDER_MM = 10
"""A nodule that a crop is made for stays this far inside it."""

_ZOOM = (0.8, 1.25)


@dataclass(frozen=True, eq=False)
class LabelledScan:
    """A prepared scan and all of its nodules (none: a clean scan)."""

    scan: Scan
    nodules: tuple[Nodule, ...]
    patient_id: str = ""

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Center indices (M, 3) in the prepared scan, and diameters in mm (M,)."""
        center = np.array([nodule.center_lps_mm for nodule in self.nodules]).reshape(-1, 3)
        diameter = np.array([nodule.diameter_mm for nodule in self.nodules])
        return self.scan.grid.to_index(center), diameter


@dataclass(frozen=True)
class Patch:
    """Network input (C, E, E, E) and what it teaches."""

    x: Tensor
    targets: Targets


class PatchSampler:
    """Patches of labelled scans; the n-th batch of a seed is the same whatever came before."""

    def __init__(
        self, scans: Sequence[LabelledScan], network: NoduleNet, edge: int, *, seed: int
    ) -> None:
        self._scans = scans
        self._arrays = [scan.arrays() for scan in scans]
        self._channels = network.channels
        self._anchors_mm = network.config.anchors_mm
        self._edge = edge
        self._seed = seed
        self._nodules = [
            (at, row) for at, (_, d) in enumerate(self._arrays) for row in range(len(d))
        ]
        # Larger nodules are rarer than they matter: weight by diameter.
        weights = np.array([self._arrays[at][1][row] for at, row in self._nodules])
        self._weights = weights / weights.sum() if len(weights) else weights

    def batch(self, step: int, size: int) -> list[Patch]:
        """The patches of one training step."""
        rng = np.random.default_rng([self._seed, step])
        return [self._patch(rng) for _ in range(size)]

    def _patch(self, rng: np.random.Generator) -> Patch:
        zoom = float(np.exp(rng.uniform(*np.log(_ZOOM))))
        cut = round(self._edge / zoom)
        if self._nodules and rng.random() >= _RANDOM_SHARE:
            which, row = self._nodules[rng.choice(len(self._nodules), p=self._weights)]
            border = min(_BORDER_MM, cut / 4)
            low = self._arrays[which][0][row] - rng.uniform(border, cut - border, 3)
        else:
            which = int(rng.integers(len(self._scans)))
            low = rng.uniform(-cut / 4, np.array(self._scans[which].scan.image.shape) - cut * 0.75)
        low = np.rint(low).astype(int)
        labelled = self._scans[which]
        x = network_input(labelled.scan, low, (cut, cut, cut), self._channels)
        scale = self._edge / cut
        x = torch.nn.functional.interpolate(x[None], size=(self._edge,) * 3, mode="trilinear")[0]
        center, diameter = self._arrays[which]
        center = (center - low + 0.5) * scale - 0.5
        x, center = _flipped(x, center, rng)
        x[:1] = _intensity(int(rng.integers(2**31)))(x[:1])
        targets = assign(
            torch.from_numpy(center).float(),
            torch.from_numpy(diameter * scale).float(),
            (self._edge // OUTPUT_STRIDE,) * 3,
            self._anchors_mm,
        )
        return Patch(x, targets)


def _flipped(x: Tensor, center: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, np.ndarray]:
    """One of the 48 symmetries of the cube, applied to a patch and the centres in it."""
    axes = rng.permutation(3)
    x = x.permute(0, *(1 + axes).tolist())
    center = center[:, axes]
    mirrored = np.flatnonzero(rng.random(3) < 0.5)
    x = x.flip((1 + mirrored).tolist()).contiguous()
    center[:, mirrored] = x.shape[1] - 1 - center[:, mirrored]
    return x, center


def _intensity(seed: int) -> Compose:
    """Scanners differ in dose, kernel and calibration."""
    smooth = (0.3, 0.9)
    return Compose([
        RandScaleIntensity(0.1, prob=0.5),
        RandShiftIntensity(0.03, prob=0.5),
        RandGaussianSmooth(smooth, smooth, smooth, prob=0.25),
        RandGaussianNoise(prob=0.4, std=0.03),
    ]).set_random_state(seed)  # fmt: skip
