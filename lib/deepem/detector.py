"""From a scan to proposals: windows over the lungs, decoding, suppression."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from monai.inferers import SlidingWindowInferer
from torch import Tensor

from deepem.boxes import decode, suppress
from deepem.model import ModelCard, load_model
from deepem.network import NoduleNet, fused, mixed_precision, pick_device
from deepem.nodule import Nodule, Proposal
from deepem.scan import Scan, prepare
from deepem.volume import Volume

MIN_LOGIT = -3.0
NMS_IOU = 0.1
"""Both from Zhu et al. 2018, Sec. 3."""

PAD_INTENSITY = 170 / 255
"""Soft tissue, where a window or a patch leaves the scan (the authors' code)."""

_MAX_CANDIDATES = 1000  # the suppression is quadratic
_LUNG_DISTANCE_MM = 10.0  # a centre farther from the lungs than this lies in the chest wall
_WINDOW = 224  # bounds the memory: about 1 GB in float32
_OVERLAP = 32
_DIVISOR = 16
_LARGEST_MM = 60.0
_SMALLEST_MM = 1.0


def network_input(scan: Scan, low: np.ndarray, shape: tuple[int, ...], channels: int) -> Tensor:
    """A patch of the scan as the network reads it: (channels, I, J, K) float32.

    low: index of its first voxel, may lie outside; what lies outside the scan is soft tissue.
    """
    high = low + shape
    inner_low, inner_high = np.maximum(low, 0), np.minimum(high, scan.image.shape)
    patch = np.full((channels, *shape), PAD_INTENSITY, np.float32)
    if (inner_low < inner_high).all():
        source = tuple(map(slice, inner_low, inner_high))
        target = tuple(map(slice, inner_low - low, inner_high - low))
        np.multiply(scan.image[source], np.float32(1 / 255), out=patch[0][target])
    if channels > 1:
        first = scan.lungs.relative(scan.grid.to_world(low))
        last = scan.lungs.relative(scan.grid.to_world(high - 1))
        for axis in range(3):
            ramp = np.linspace(first[axis], last[axis], shape[axis], dtype=np.float32) * 2 - 1
            patch[1 + axis] = np.expand_dims(ramp, tuple(at for at in range(3) if at != axis))
    return torch.from_numpy(patch)


@torch.inference_mode()
def propose(
    network: NoduleNet, scan: Scan, device: torch.device, min_logit: float = MIN_LOGIT
) -> list[Proposal]:
    """All proposals of a scan above ``min_logit``, best first, suppressed at IoU 0.1.

    Memory is bounded by the windows, at most 224^3 voxels, not by the scan; neighbours overlap by
    32 voxels or more and their maps are blended with Gaussian weights.
    """
    shape = tuple(max(_rounded_up(size), _OVERLAP) for size in scan.image.shape)
    x = network_input(scan, np.zeros(3, int), shape, network.channels)[None]
    window = tuple(_window(size) for size in shape)
    # A hair less overlap than 32: the step between windows is truncated and must stay whole cells.
    overlap = tuple((_OVERLAP - 0.01) / size for size in window)
    inferer = SlidingWindowInferer(window, overlap=overlap, mode="gaussian", device="cpu",
                                   sw_device=device)  # fmt: skip

    def predict(batch: Tensor) -> Tensor:
        with mixed_precision(device):
            return network(batch.contiguous(memory_format=torch.channels_last_3d))

    maps = inferer(x, predict)[0]
    logit, center, diameter = decode(maps, network.config.anchors_mm, min_logit, _MAX_CANDIDATES)
    points = scan.grid.to_world(center.numpy())
    usable = (scan.lungs.distance_mm(points) <= _LUNG_DISTANCE_MM) & (
        (diameter.numpy() >= _SMALLEST_MM) & (diameter.numpy() <= _LARGEST_MM)
    )
    rows = torch.from_numpy(np.flatnonzero(usable))
    rows = rows[suppress(logit[rows], center[rows], diameter[rows], NMS_IOU)]
    return [
        Proposal(Nodule(tuple(points[at]), float(diameter[at])), float(logit[at]))
        for at in rows.tolist()
    ]


def _rounded_up(size: float) -> int:
    return math.ceil(size / _DIVISOR) * _DIVISOR


def _window(size: int) -> int:
    """The smallest window that covers an axis in as few steps as the largest would."""
    count = max(1, math.ceil((size - _OVERLAP) / (_WINDOW - _OVERLAP)))
    return min(size, _rounded_up((size + (count - 1) * _OVERLAP) / count))


class Detector:
    """A published model, ready to look at scans."""

    def __init__(self, network: NoduleNet, card: ModelCard, device: str = "auto"):
        self.card = card
        self.device = pick_device(device)
        self.network = fused(network).to(self.device)

    @classmethod
    def load(cls, path: Path, device: str = "auto") -> Detector:
        """From a model file or the folder of one. InputError if it is none."""
        return cls(*load_model(path), device)

    def detect(self, volume: Volume) -> list[Proposal]:
        """Proposals in a CT, best first, centres and diameters in mm of its own world."""
        return self.propose(prepare(volume))

    def propose(self, scan: Scan) -> list[Proposal]:
        """The same for a scan that is prepared already."""
        return propose(self.network, scan, self.device)
