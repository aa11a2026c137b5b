"""Nodules and their look-alikes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from deepem.phantom.anatomy import Anatomy
from deepem.phantom.raster import (
    Axes,
    Capsules,
    between,
    blend,
    capsule_depth,
    occupancy,
    points_of,
    shape_of,
    sub_axes,
)

DIAMETER_RANGE_MM = (4.0, 20.0)
KINDS = ("solid", "part_solid", "ground_glass")
SHAPES = ("round", "lobulated", "spiculated")
ATTACHMENTS = ("free", "juxta_pleural", "juxta_vascular")

_TRUTH_STEP_MM = 0.4
_SMALLEST_SUBSOLID_MM = 6.0  # nobody sees or reports smaller ones
_LEAST_FILLED = 0.4  # of the annotated sphere: no slivers along the pleura
_LEAST_DEPTH_MM = 1.5  # of the annotated centre
_TRIES = 60
_BUMP_SHARPNESS = 9.0


@dataclass(frozen=True, eq=False)
class Lesion:
    """A body whose radius depends on the direction, with optional spicules.

    semi_axes_mm (3,) of the basic ellipsoid; bump_directions (B, 3) unit vectors and bump_heights
    (B,) relative to it. ``fill`` is the share f of HU' = HU + f * max(target - HU, 0); a core of
    ``core_share`` of the diameter is filled wholly.
    """

    kind: str
    shape: str
    attachment: str
    center_mm: np.ndarray
    semi_axes_mm: np.ndarray
    bump_directions: np.ndarray
    bump_heights: np.ndarray
    spicules: Capsules
    fill: float
    target_hu: float
    edge_mm: float
    core_share: float = 0.0

    @property
    def reach_mm(self) -> float:
        """Radius of a ball around the body, without spicules."""
        return float(self.semi_axes_mm.max() * (1 + np.maximum(self.bump_heights, 0).max()))

    def depth_mm(self, points_mm: np.ndarray, size: float = 1.0) -> np.ndarray:
        """Depth below the surface of the body scaled by ``size`` at points (..., 3)."""
        offset = points_mm - self.center_mm
        distance = np.linalg.norm(offset, axis=-1)
        direction = offset / np.maximum(distance, 1e-6)[..., None]
        radius = 1 / np.linalg.norm(direction / self.semi_axes_mm, axis=-1)
        closeness = direction @ self.bump_directions.T - 1
        radius = radius * (1 + np.exp(_BUMP_SHARPNESS * closeness) @ self.bump_heights)
        return (size * radius - distance).astype(np.float32)

    def extent_mm(self, anatomy: Anatomy) -> tuple[np.ndarray, float, float]:
        """Centre (3,), diameter, and share of its sphere filled, of the body inside the lung.

        The diameter is the mean of the three edges. Measured on a fine grid, so it includes what
        the bumps add and the pleura cuts off; 0 when nothing is left.
        """
        reach = self.reach_mm + _TRUTH_STEP_MM
        steps = np.arange(-reach, reach + _TRUTH_STEP_MM, _TRUTH_STEP_MM)
        points = points_of(tuple(steps + c for c in self.center_mm))
        inside = self.depth_mm(points) > 0
        if self.attachment == "juxta_pleural":
            inside &= anatomy.lung_depth_mm(points) > 0
        if not inside.any():
            return self.center_mm, 0.0, 0.0
        found = points[inside]
        low, high = found.min(0), found.max(0)
        diameter = float((high - low).mean() + _TRUTH_STEP_MM)
        volume = len(found) * _TRUTH_STEP_MM**3
        return (low + high) / 2, diameter, volume / (math.pi / 6 * diameter**3)

    def paint(self, hu: np.ndarray, axes: Axes, in_lung: np.ndarray) -> None:
        """Draw into ``hu``; ``in_lung`` is the lung's share of each voxel."""
        reach = 2.4 * self.reach_mm + 2
        box = between(axes, self.center_mm - reach, self.center_mm + reach)
        local = sub_axes(axes, box)
        if min(shape_of(local)) == 0:
            return
        points = points_of(local)
        body = occupancy(self.depth_mm(points), self.edge_mm) * np.float32(self.fill)
        if self.core_share:
            core = occupancy(self.depth_mm(points, self.core_share), 1.0)
            body = np.maximum(body, core)
        if len(self.spicules):
            spicules = occupancy(capsule_depth(local, self.spicules, 1.0), 1.0)
            body = np.maximum(body, spicules * np.float32(0.8 * self.fill))
        view = hu[box]
        # A voxel half in the lung is half soft tissue already: what is missing is the lung's half.
        view += body * (in_lung[box] > 0) * np.maximum(self.target_hu - view, 0)


def _random_directions(rng: np.random.Generator, count: int) -> np.ndarray:
    vectors = rng.standard_normal((count, 3))
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _spicules(rng: np.random.Generator, center: np.ndarray, radius: float) -> Capsules:
    count = rng.integers(6, 21)
    direction = _random_directions(rng, count)
    length = radius + rng.uniform(1.5, 2 + radius, (count, 1))
    return Capsules(
        center + 0.6 * radius * direction,
        center + length * direction,
        np.stack([rng.uniform(0.7, 1.2, count), rng.uniform(0.15, 0.4, count)], -1),
    )


def _lesion(
    rng: np.random.Generator,
    kind: str,
    shape: str,
    attachment: str,
    center: np.ndarray,
    diameter: float,
) -> Lesion:
    radius = diameter / 2
    lobulated = shape == "lobulated"
    bumps = int(rng.integers(5, 10)) if lobulated else 12
    height = rng.uniform(0.2, 0.55, bumps) if lobulated else rng.normal(0, 0.08, bumps)
    calcified = kind == "solid" and rng.random() < 0.08
    return Lesion(
        kind=kind,
        shape=shape,
        attachment=attachment,
        center_mm=center,
        semi_axes_mm=radius * np.exp(rng.normal(0, 0.13, 3)),
        bump_directions=_random_directions(rng, bumps),
        bump_heights=height,
        spicules=(_spicules(rng, center, radius) if shape == "spiculated" else Capsules.none()),
        fill=1.0 if kind == "solid" else rng.uniform(0.22, 0.42),
        target_hu=rng.uniform(150, 400) if calcified else rng.uniform(-30, 60),
        edge_mm=rng.uniform(0.9, 1.6) if kind == "solid" else rng.uniform(1.2, 2.2),
        core_share=rng.uniform(0.25, 0.6) if kind == "part_solid" else 0.0,
    )


def place_nodules(
    rng: np.random.Generator, count: int, anatomy: Anatomy, vessels: Capsules
) -> list[tuple[Lesion, np.ndarray, float]]:
    """``count`` nodules that lie in the lungs and keep apart: lesion, centre (3,), diameter in mm.

    Fewer when a lung is too crowded for one more.
    """
    placed: list[tuple[Lesion, np.ndarray, float]] = []
    low, high = DIAMETER_RANGE_MM
    depth = -anatomy.lung_mm
    wide = vessels.radius_mm[:, 0] > 0.9
    for _ in range(count):
        kind = rng.choice(KINDS, p=(0.62, 0.18, 0.20))
        shape = rng.choice(SHAPES, p=(0.5, 0.3, 0.2))
        attachment = rng.choice(ATTACHMENTS, p=(0.5, 0.27, 0.23))
        smallest = low if kind == "solid" else _SMALLEST_SUBSOLID_MM
        diameter = float(smallest * (high / smallest) ** (rng.random() ** 1.4))
        for _attempt in range(_TRIES):
            center = _candidate(rng, attachment, diameter, anatomy, depth, vessels, wide)
            lesion = _lesion(rng, kind, shape, attachment, center, diameter)
            _, measured, _ = lesion.extent_mm(anatomy)
            if measured < 0.45 * diameter:
                continue
            factor = diameter / measured
            lesion = replace(lesion, semi_axes_mm=lesion.semi_axes_mm * factor)
            center, measured, filled = lesion.extent_mm(anatomy)
            near = any(
                np.linalg.norm(center - other) < (measured + width) / 2 + 4
                for _, other, width in placed
            )
            inside = anatomy.lung_depth_mm(center) > _LEAST_DEPTH_MM
            if near or not inside or not low <= measured <= high or filled < _LEAST_FILLED:
                continue
            if not _in_view(anatomy, lesion):
                continue
            placed.append((lesion, center, measured))
            break
    return placed


def _in_view(anatomy: Anatomy, lesion: Lesion) -> bool:
    reach = lesion.reach_mm + 2
    return all(
        axis[0] < center - reach and center + reach < axis[-1]
        for axis, center in zip(anatomy.axes, lesion.center_mm, strict=True)
    )


def _candidate(
    rng: np.random.Generator,
    attachment: str,
    diameter: float,
    anatomy: Anatomy,
    depth: np.ndarray,
    vessels: Capsules,
    wide: np.ndarray,
) -> np.ndarray:
    """Draw a random centre with the attachment asked for."""
    radius = diameter / 2
    if attachment == "juxta_vascular" and wide.any():
        n = rng.choice(np.flatnonzero(wide & (vessels.radius_mm[:, 0] < 2.5)))
        along = vessels.end_mm[n] - vessels.start_mm[n]
        side = np.cross(along, _random_directions(rng, 1)[0])
        side /= np.linalg.norm(side) + 1e-6
        return vessels.start_mm[n] + 0.85 * (radius + vessels.radius_mm[n, 0]) * side
    if attachment == "juxta_pleural":
        shell = (depth > -0.2 * radius) & (depth < 0.7 * radius)
    else:
        shell = depth > radius + 1.5
    chosen = np.argwhere(shell)
    if not len(chosen):
        chosen = np.argwhere(depth > 0)
    index = chosen[rng.integers(len(chosen))]
    step = np.array([axis[1] - axis[0] for axis in anatomy.axes])
    center = np.array([axis[i] for axis, i in zip(anatomy.axes, index, strict=True)])
    center = center + rng.uniform(-0.5, 0.5, 3) * step
    if attachment == "free" and wide.any():
        # Free means clear of the larger vessels: step away from the nearest one.
        nodes = vessels.start_mm[wide]
        offset = center - nodes
        nearest = np.argmin(np.linalg.norm(offset, axis=1) - vessels.radius_mm[wide, 0])
        gap = np.linalg.norm(offset[nearest]) - vessels.radius_mm[wide][nearest, 0]
        if gap < radius + 1:
            away = offset[nearest] / (np.linalg.norm(offset[nearest]) + 1e-6)
            center = center + away * min(radius + 1 - gap, radius)
    return center


def paint_distractors(
    rng: np.random.Generator,
    hu: np.ndarray,
    axes: Axes,
    in_lung: np.ndarray,
    anatomy: Anatomy,
    vessels: Capsules,
) -> None:
    """Add what is no nodule: micro-nodules, vessel bulges, scars, hilar lymph nodes, plaques."""
    depth = -anatomy.lung_mm
    litres = float((depth > 0).sum() * np.prod([a[1] - a[0] for a in anatomy.axes]) / 1e6)

    def point(shell: np.ndarray) -> np.ndarray | None:
        index = np.argwhere(shell)
        if not len(index):
            return None
        chosen = index[rng.integers(len(index))]
        return np.array([axis[i] for axis, i in zip(anatomy.axes, chosen, strict=True)])

    for _ in range(rng.poisson(3 + 2 * litres)):
        center = point(depth > 1)
        if center is not None:
            small = _lesion(rng, "solid", "round", "free", center, rng.uniform(1.2, 2.8))
            small.paint(hu, axes, in_lung)
    for n in rng.choice(len(vessels.start_mm), rng.poisson(4 + 3 * litres)):
        if 0.5 < vessels.radius_mm[n, 0] < 2.5:
            wide = vessels.radius_mm[n, 0] * rng.uniform(1.2, 1.5)
            start, end = vessels.start_mm[n], vessels.end_mm[n]
            _paint_strand(rng, hu, axes, in_lung, start, end, (wide, wide), 40.0)
    for _ in range(rng.poisson(1.0 + 0.6 * litres)):
        center = point((depth > 0) & (depth < 3))
        if center is not None:
            end = center + rng.uniform(6, 22) * _random_directions(rng, 1)[0]
            for _strand in range(rng.integers(1, 4)):
                tip = end + rng.normal(0, 4, 3)
                radii = (rng.uniform(0.5, 1.4), 0.4)
                _paint_strand(rng, hu, axes, in_lung, center, tip, radii, -60.0)
    hilar = np.flatnonzero(vessels.radius_mm[:, 0] > 0.6 * vessels.radius_mm.max())
    for n in rng.choice(hilar, rng.poisson(6)):
        # Lymph nodes and fat around the largest vessels.
        width = vessels.radius_mm[n, 0] * rng.uniform(0.5, 1.1)
        center = vessels.start_mm[n] + rng.normal(0, vessels.radius_mm[n, 0], 3)
        lump = _lesion(rng, "solid", "lobulated", "free", center, 1.6 * width)
        lump.paint(hu, axes, in_lung)
    for _ in range(rng.poisson(0.8)):
        center = point((depth > -1.5) & (depth < 0.5))
        if center is not None:
            _paint_plaque(rng, hu, axes, anatomy, center)


def _paint_strand(
    rng: np.random.Generator,
    hu: np.ndarray,
    axes: Axes,
    in_lung: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    radii: tuple[float, float],
    value: float,
) -> None:
    """Draw a tapered strand in the lung."""
    reach = max(radii) + 2
    box = between(axes, np.minimum(start, end) - reach, np.maximum(start, end) + reach)
    local = sub_axes(axes, box)
    if min(shape_of(local)) == 0:
        return
    strand = Capsules.along(np.stack([start, end]), np.array(radii))
    share = (
        occupancy(capsule_depth(local, strand, 1.0), 1.0)
        * in_lung[box]
        * np.float32(rng.uniform(0.6, 1.0))
    )
    view = hu[box]
    view += share * np.maximum(value - view, 0)


def _paint_plaque(
    rng: np.random.Generator, hu: np.ndarray, axes: Axes, anatomy: Anatomy, center: np.ndarray
) -> None:
    """Draw a flat thickening of the pleura, sometimes calcified."""
    width, thick = rng.uniform(5, 14), rng.uniform(1.2, 3.0)
    box = between(axes, center - width - 2, center + width + 2)
    local = sub_axes(axes, box)
    if min(shape_of(local)) == 0:
        return
    points = points_of(local)
    away = np.linalg.norm(points - center, axis=-1)
    profile = thick * np.sqrt(np.maximum(1 - (away / width) ** 2, 0))
    below = anatomy.lung_depth_mm(points)
    share = occupancy((profile - below).astype(np.float32), 1.0) * (profile > 0) * (below > -2)
    value = rng.uniform(200, 500) if rng.random() < 0.3 else rng.uniform(10, 60)
    blend(hu[box], share.astype(np.float32), value)
