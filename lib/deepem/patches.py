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
    """A prepared scan and all of its nodules (none: a clean scan).

    weights, doubts: how much each nodule is taught to be one, and to be none, 0..1; by default all
    1 and all 0. One with neither may be a nodule or not: it teaches nothing. unsure_z_lps_mm:
    ranges in which there may be nodules that nobody knows of: no background is taught there.
    """

    scan: Scan
    nodules: tuple[Nodule, ...]
    patient_id: str = ""
    weights: tuple[float, ...] | None = None
    doubts: tuple[float, ...] | None = None
    unsure_z_lps_mm: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        count = len(self.nodules)
        for name, values in (("weights", self.weights), ("doubts", self.doubts)):
            if values is not None and not (
                len(values) == count and all(0 <= value <= 1 for value in values)
            ):
                raise ValueError(f"{name}: expected {count} in 0..1, got {list(values)}")

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Center indices (M, 3) in the prepared scan, and diameters in mm (M,)."""
        center = np.array([nodule.center_lps_mm for nodule in self.nodules]).reshape(-1, 3)
        diameter = np.array([nodule.diameter_mm for nodule in self.nodules])
        return self.scan.grid.to_index(center), diameter

    def unsure_k(self) -> np.ndarray:
        """(U, 2) `unsure_z_lps_mm` as index along the third axis of the prepared scan."""
        z = np.reshape(self.unsure_z_lps_mm, (-1, 2))
        return (z - self.scan.grid.affine_lps_mm[2, 3]) / self.scan.grid.affine_lps_mm[2, 2]


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
        self._unsure_k = [scan.unsure_k() for scan in scans]
        self._weight = [_filled(scan.weights, 1.0, len(scan.nodules)) for scan in scans]
        self._doubt = [_filled(scan.doubts, 0.0, len(scan.nodules)) for scan in scans]
        self._channels = network.channels
        self._anchors_mm = network.config.anchors_mm
        self._edge = edge
        self._seed = seed
        self._nodules = [
            (at, int(row)) for at, w in enumerate(self._weight) for row in np.flatnonzero(w)
        ]
        # Larger nodules are rarer than they matter; a nodule of half the weight has half the crops.
        chance = np.array([
            self._arrays[at][1][row] * self._weight[at][row] for at, row in self._nodules
        ])  # fmt: skip
        self._chance = chance / chance.sum() if len(chance) else chance

    def batch(self, step: int, size: int) -> list[Patch]:
        """The patches of one training step."""
        rng = np.random.default_rng([self._seed, step])
        return [self._patch(rng) for _ in range(size)]

    def _patch(self, rng: np.random.Generator) -> Patch:
        zoom = float(np.exp(rng.uniform(*np.log(_ZOOM))))
        cut = round(self._edge / zoom)
        if self._nodules and rng.random() >= _RANDOM_SHARE:
            which, row = self._nodules[rng.choice(len(self._nodules), p=self._chance)]
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
        unsure = self._unsure_cells(which, low[2], scale)
        x, center, unsure = _flipped(x, center, unsure, rng)
        x[:1] = _intensity(int(rng.integers(2**31)))(x[:1])
        targets = assign(
            torch.from_numpy(center).float(),
            torch.from_numpy(diameter * scale).float(),
            tuple(unsure.shape),
            self._anchors_mm,
            torch.from_numpy(self._weight[which]).float(),
            torch.from_numpy(self._doubt[which]).float(),
            unsure,
        )
        return Patch(x, targets)

    def _unsure_cells(self, which: int, low_k: int, scale: float) -> Tensor:
        """(I, J, K) bool: output cells of a patch that lie where nobody knows."""
        cells = self._edge // OUTPUT_STRIDE
        in_patch = np.arange(cells) * OUTPUT_STRIDE + (OUTPUT_STRIDE - 1) / 2
        k = low_k + (in_patch + 0.5) / scale - 0.5
        low, high = self._unsure_k[which].T[..., None]
        return torch.from_numpy(((k >= low) & (k <= high)).any(0)).expand(cells, cells, cells)


def _filled(values: tuple[float, ...] | None, default: float, count: int) -> np.ndarray:
    return np.full(count, default) if values is None else np.array(values, float)


def _flipped(
    x: Tensor, center: np.ndarray, unsure: Tensor, rng: np.random.Generator
) -> tuple[Tensor, np.ndarray, Tensor]:
    """One of the 48 symmetries of the cube, applied to a patch and to what is in it."""
    axes = rng.permutation(3)
    x = x.permute(0, *(1 + axes).tolist())
    unsure = unsure.permute(*axes.tolist())
    center = center[:, axes]
    mirrored = np.flatnonzero(rng.random(3) < 0.5)
    x = x.flip((1 + mirrored).tolist()).contiguous()
    unsure = unsure.flip(mirrored.tolist())
    center[:, mirrored] = x.shape[1] - 1 - center[:, mirrored]
    return x, center, unsure


def _intensity(seed: int) -> Compose:
    """Scanners differ in dose, kernel and calibration."""
    smooth = (0.3, 0.9)
    return Compose([
        RandScaleIntensity(0.1, prob=0.5),
        RandShiftIntensity(0.03, prob=0.5),
        RandGaussianSmooth(smooth, smooth, smooth, prob=0.25),
        RandGaussianNoise(prob=0.4, std=0.03),
    ]).set_random_state(seed)  # fmt: skip
