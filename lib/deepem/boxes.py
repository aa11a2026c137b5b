"""Anchors of the detector: which ones a nodule trains, and what the network says about them.

Everything here is in voxels of a prepared scan or of a patch of it (1 voxel = 1 mm). Maps have the
shape (A, I, J, K): anchor size, then output cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from monai.data.box_utils import box_iou, non_max_suppression
from torch import Tensor

from deepem.network import OUTPUT_STRIDE, VALUES_PER_ANCHOR

POSITIVE_IOU = 0.5
NEGATIVE_IOU = 0.02
"""Between the two an anchor trains nothing (Zhu et al. 2018, the authors' code)."""

_MIN_POSITIVES = 4
"""Anchors that every nodule trains, however badly they fit: sizes and cells are coarse."""

_LOG_SIZE_LIMIT = 3.0
"""exp(3) = 20 anchor edges; keeps an untrained network from infinite boxes."""


@dataclass(frozen=True)
class Targets:
    """What one patch teaches. Indices point into the flattened map (A * I * J * K).

    positive: (P,) anchors; regression: (P, 4) dx, dy, dz, log size of each; nodule: (P,) which
    nodule each one stands for; weight, doubt: (P,) how much that nodule is taught to be one, and to
    be none; negative: (N,) anchors far from every nodule.
    """

    positive: Tensor
    regression: Tensor
    nodule: Tensor
    weight: Tensor
    doubt: Tensor
    negative: Tensor


def cell_centers(map_shape: Sequence[int]) -> Tensor:
    """(I, J, K, 3) index of the centre of each output cell."""
    axes = [torch.arange(size, dtype=torch.float32) for size in map_shape]
    cells = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    return cells * OUTPUT_STRIDE + (OUTPUT_STRIDE - 1) / 2


def cubes(center: Tensor, edge: Tensor) -> Tensor:
    """Centers (N, 3) and edges (N,) -> (N, 6) lowest and highest corner."""
    half = edge[:, None] / 2
    return torch.cat([center - half, center + half], 1)


def assign(
    center_index: Tensor,
    diameter: Tensor,
    map_shape: Sequence[int],
    anchors_mm: Sequence[float],
    weight: Tensor | None = None,
    doubt: Tensor | None = None,
    unsure: Tensor | None = None,
) -> Targets:
    """Match M nodules, centers (M, 3) and diameters (M,), to the anchors of a patch.

    An anchor is positive for the nodule it overlaps most if their IoU exceeds 0.5 or if it is one
    of the nodule's four best; negative if no IoU reaches 0.02. Nodules with their centre outside
    the patch train nothing, but keep the anchors that they touch from being negative; so do those
    without weight and doubt. weight, doubt: (M,), by default 1 and 0. unsure: (I, J, K) bool, cells
    without negatives.
    """
    cells = cell_centers(map_shape).reshape(-1, 3)
    edges = torch.tensor(anchors_mm, dtype=torch.float32)
    anchor_center = cells.repeat(len(edges), 1)
    anchor_edge = edges.repeat_interleave(len(cells))
    sure = torch.ones(len(anchor_edge), dtype=torch.bool)
    if unsure is not None:
        sure = ~unsure.flatten().repeat(len(edges))
    if len(diameter) == 0:
        nothing = torch.empty(0, dtype=torch.long)
        empty = torch.empty(0)
        return Targets(nothing, torch.empty(0, 4), nothing, empty, empty, sure.nonzero()[:, 0])
    weight = torch.ones(len(diameter)) if weight is None else weight
    doubt = torch.zeros(len(diameter)) if doubt is None else doubt
    overlap = box_iou(cubes(anchor_center, anchor_edge), cubes(center_index, diameter))
    iou = torch.as_tensor(overlap)
    best_iou, nodule = iou.max(1)
    negative = ((best_iou < NEGATIVE_IOU) & sure).nonzero()[:, 0]

    limits = torch.tensor(map_shape) * OUTPUT_STRIDE - 0.5
    inside = ((center_index > -0.5) & (center_index < limits)).all(1)
    forced = iou.topk(_MIN_POSITIVES, dim=0).indices  # (4, M)
    # Of two nodules that share a best anchor the one that fits it less gives way.
    order = iou.gather(0, forced).flatten().argsort()
    owner = torch.arange(len(diameter)).expand_as(forced).flatten()[order]
    nodule[forced.flatten()[order]] = owner
    is_positive = best_iou > POSITIVE_IOU
    is_positive[forced.flatten()] = True
    positive = (is_positive & (inside & (weight + doubt > 0))[nodule]).nonzero()[:, 0]

    nodule = nodule[positive]
    offset = (center_index[nodule] - anchor_center[positive]) / anchor_edge[positive, None]
    log_size = (diameter[nodule] / anchor_edge[positive]).log()
    regression = torch.cat([offset, log_size[:, None]], 1)
    return Targets(positive, regression, nodule, weight[nodule], doubt[nodule], negative)


def decode(
    maps: Tensor, anchors_mm: Sequence[float], min_logit: float, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Network output (A * 5, I, J, K) -> logits (N,), center indices (N, 3), diameters (N,).

    Only proposals above ``min_logit``, and at most ``most`` of them, best first.
    """
    anchors = len(anchors_mm)
    map_shape = maps.shape[1:]
    values = maps.float().unflatten(0, (anchors, VALUES_PER_ANCHOR))
    logit = values[:, 0].flatten()
    logit, at = logit.topk(min(most, logit.numel()))
    keep = logit > min_logit
    logit, at = logit[keep], at[keep]
    cells = at.remainder(map_shape.numel())
    anchor = at.div(map_shape.numel(), rounding_mode="floor")
    index = torch.stack(torch.unravel_index(cells, map_shape), 1)
    center = index * OUTPUT_STRIDE + (OUTPUT_STRIDE - 1) / 2
    edge = torch.tensor(anchors_mm, device=maps.device, dtype=torch.float32)[anchor]
    chosen = values[anchor, :, index[:, 0], index[:, 1], index[:, 2]]  # (N, 5)
    diameter = edge * chosen[:, 4].clamp(-_LOG_SIZE_LIMIT, _LOG_SIZE_LIMIT).exp()
    return logit, center + chosen[:, 1:4] * edge[:, None], diameter


def suppress(logit: Tensor, center: Tensor, diameter: Tensor, iou: float) -> Tensor:
    """Non-maximum suppression: indices of the proposals to keep, best first.

    Gone are cubes that overlap a better one by more than ``iou``, and then those that share their
    place with a better one of quite another size, whose IoU is small by the sizes alone: one
    centre lies in the other's sphere. Nodules do not lie inside each other.
    """
    rows = torch.as_tensor(non_max_suppression(cubes(center, diameter), logit, iou))
    radius = diameter[rows] / 2
    nested = torch.cdist(center[rows], center[rows]) < torch.maximum(radius[:, None], radius)
    kept = torch.ones(len(rows), dtype=torch.bool)
    for at in range(1, len(rows)):
        kept[at] = not (nested[at, :at] & kept[:at]).any()
    return rows[kept]
