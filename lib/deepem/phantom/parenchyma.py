"""What fills the lungs: aerated tissue, fissures, vessels and airways."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from deepem.phantom.anatomy import Anatomy
from deepem.phantom.raster import (
    Axes,
    Capsules,
    blend,
    box_around,
    capsule_depth,
    occupancy,
    resample,
    shape_of,
    smooth_noise,
    spacing_mm,
    sub_axes,
)
from deepem.phantom.trees import LungTrees


def paint_lungs(
    rng: np.random.Generator,
    hu: np.ndarray,
    in_lung: np.ndarray,
    anatomy: Anatomy,
    axes: Axes,
    trees: LungTrees,
) -> None:
    """Parenchyma, fissures, vessels and airways, in place."""
    box = box_around(anatomy.lung_mm < 2, anatomy.axes, axes)
    local = sub_axes(axes, box)
    edge = float(spacing_mm(axes).mean())
    lung = _parenchyma(rng, anatomy, local)

    side = resample(anatomy.side_mm, anatomy.axes, local)
    oblique = resample(anatomy.oblique_mm, anatomy.axes, local)
    horizontal = resample(anatomy.horizontal_mm, anatomy.axes, local)
    broken = smooth_noise(rng, local, 20.0)
    sheet = np.exp(-((oblique / 0.6) ** 2))
    sheet = np.maximum(sheet, np.exp(-((horizontal / 0.6) ** 2)) * ((side < 0) & (oblique > 0)))
    sheet *= rng.uniform(100, 300) * np.clip(0.7 + 0.5 * broken, 0, 1)
    lung += sheet
    del side, oblique, horizontal, broken, sheet

    blood = float(np.clip(anatomy.blood_hu, 25, 250))
    # The thinnest vessels fill a part of a voxel: drawn at least half a voxel wide, but fainter.
    for thin in (True, False):
        tree = trees.vessels.of((trees.vessels.radius_mm[:, 0] < 0.5 * edge) == thin)
        drawn = replace(tree, radius_mm=np.maximum(tree.radius_mm, 0.5 * edge))
        share = occupancy(capsule_depth(local, drawn, edge), edge)
        if thin and len(tree):
            share *= float((tree.radius_mm.mean() / (0.5 * edge)) ** 2)
        blend(lung, share, blood)

    _paint_airways(lung, local, trees.bronchi, 0.7)
    view = hu[box]
    view += in_lung[box] * (lung - view)
    del lung
    _paint_airways(hu, axes, trees.windpipe, 1.0)


def _paint_airways(hu: np.ndarray, axes: Axes, tree: Capsules, wall_mm: float) -> None:
    """Tubes filled with air, in place."""
    edge = float(spacing_mm(axes).mean())
    depth = capsule_depth(axes, tree, edge + wall_mm)
    blend(hu, occupancy(depth + wall_mm, edge) * (hu < 0), -20.0)
    blend(hu, occupancy(depth, edge), -985.0)


def _parenchyma(rng: np.random.Generator, anatomy: Anatomy, axes: Axes) -> np.ndarray:
    """Aerated lung with a gravity gradient, mottling, emphysema and dependent atelectasis; HU."""
    shape = shape_of(axes)
    mean, slope = rng.uniform(-885, -815), rng.uniform(20, 100)
    y = axes[1] / (100 * anatomy.scale)
    lung = np.broadcast_to((mean + slope / 2 * y).astype(np.float32)[:, None], shape).copy()
    lung += rng.uniform(6, 16) * smooth_noise(rng, axes, 22.0)
    lung += rng.uniform(5, 14) * smooth_noise(rng, axes, 7.0)
    # Vessels and septa below the resolution: a skewed grain.
    grain = rng.standard_normal(shape, dtype=np.float32)
    np.maximum(grain - 0.7, 0, out=grain)
    grain *= rng.uniform(40, 90)
    lung += grain
    del grain
    if rng.random() < 0.18:
        holes = smooth_noise(rng, axes, rng.uniform(4, 9)) + 0.8 * smooth_noise(rng, axes, 40.0)
        blend(lung, np.clip((holes - 1.2) * 1.5, 0, 1), -965.0)
    if rng.random() < 0.5:
        depth = -resample(anatomy.lung_mm, anatomy.axes, axes)
        width = rng.uniform(1.5, 5.0)
        band = np.exp(-np.maximum(depth, 0) / width)
        band *= np.clip((y - 0.25) * 2, 0, 1).astype(np.float32)[:, None]
        band *= np.clip(0.6 + 0.6 * smooth_noise(rng, axes, 12.0), 0, 1)
        lung += band * rng.uniform(80, 350)
    return lung
