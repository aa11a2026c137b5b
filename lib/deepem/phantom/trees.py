"""Vessels and airways of the lungs.

The vessel trees branch to fill a volume (the idea of Tawhai et al., Ann Biomed Eng 2000): walk
towards the centre of the points that a branch must reach, divide the points, recurse. Calibres
follow a power law, as Murray's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepem.phantom.anatomy import CARINA, HILUM, TRACHEA_TOP, Anatomy
from deepem.phantom.raster import Axes, Capsules, spacing_mm

_VESSEL_VOLUME_MM3 = 700.0  # lung that one terminal vessel supplies
_TERMINAL_RADIUS_MM = 0.38
_ROOT_RADIUS_MM = 7.5  # of an adult; less than proportionally narrower in a mini chest
_LEAST_BRONCHIAL_ARTERY_MM = 1.6  # radius; no bronchus is seen beside a thinner one
_VEINS_FROM_ARTERIES = (0.0, 4.0, -14.0)  # at the hilum, adult mm
_AIRWAY_RADII_MM = (9.0, 8.0, 6.0, 5.0)  # trachea, carina, hilum, first bronchus of an adult


@dataclass(frozen=True, eq=False)
class LungTrees:
    """Arteries and veins; bronchi, which run beside the arteries; trachea and main bronchi."""

    vessels: Capsules
    bronchi: Capsules
    windpipe: Capsules


def grow_trees(rng: np.random.Generator, anatomy: Anatomy) -> LungTrees:
    """Fill both lungs of a chest; no branch leaves its lobe."""
    lobes = anatomy.lobes()
    volume_mm3 = _VESSEL_VOLUME_MM3 * rng.uniform(0.7, 1.5)
    vessels, bronchi, windpipe = [], [], []
    for side, numbers in ((-1, (1, 2, 3)), (1, (4, 5, 6))):
        hilum = np.array(HILUM[side]) * anatomy.scale
        territories = [np.argwhere((lobes == n) & (anatomy.lung_mm < -1.2)) for n in numbers]
        for shift in ((0.0, 0.0, 0.0), _VEINS_FROM_ARTERIES):
            groups = [
                _scattered(rng, territory, anatomy.axes, volume_mm3)
                for territory in territories
                if len(territory)
            ]
            root = _ROOT_RADIUS_MM * anatomy.scale**0.5 * rng.uniform(0.8, 1.15)
            terminal = _TERMINAL_RADIUS_MM * rng.uniform(0.85, 1.2)
            vessels.append(
                _grow(rng, hilum + np.array(shift) * anatomy.scale, groups, root, terminal)
            )
        beside = _beside(rng, vessels[-2])
        widest = beside.start_mm[beside.radius_mm[:, 0].argmax()]
        bronchi.append(beside)
        carina, top = (np.array(point) * anatomy.scale for point in (CARINA, TRACHEA_TOP))
        path = np.array([top, carina, hilum + (0, 0, 6 * anatomy.scale), widest])
        windpipe.append(Capsules.along(path, np.array(_AIRWAY_RADII_MM) * anatomy.scale**0.8))
    return LungTrees(*map(Capsules.join, (vessels, bronchi, windpipe)))


def _scattered(
    rng: np.random.Generator, territory: np.ndarray, axes: Axes, volume_mm3: float
) -> np.ndarray:
    """Random points (N, 3) in mm in the voxels (M, 3), one per ``volume_mm3``, at least three."""
    count = max(int(len(territory) * np.prod(spacing_mm(axes)) / volume_mm3), 3)
    index = territory[rng.integers(len(territory), size=count)]
    index = index + rng.uniform(-0.5, 0.5, index.shape)
    columns = [np.interp(index[:, d], np.arange(len(axes[d])), axes[d]) for d in range(3)]
    return np.stack(columns, -1)


def _beside(rng: np.random.Generator, arteries: Capsules) -> Capsules:
    """Bronchi along the wider arteries, all on one side of them."""
    radius = arteries.radius_mm[:, 0]
    central = arteries.of(radius > min(_LEAST_BRONCHIAL_ARTERY_MM, 0.9 * radius.max()))
    calibre = 0.85 * central.radius_mm
    direction = rng.normal(0, 1, 3) + np.array([0, 0.6, 0.8])
    direction /= np.linalg.norm(direction)
    gap = (central.radius_mm + calibre + 0.5)[..., None] * direction
    return Capsules(central.start_mm + gap[:, 0], central.end_mm + gap[:, 1], calibre)


def _grow(
    rng: np.random.Generator,
    root_mm: np.ndarray,
    groups: list[np.ndarray],
    root_radius_mm: float,
    terminal_radius_mm: float,
) -> Capsules:
    """Tree from ``root_mm`` to every point of ``groups``, a list of (N, 3): one subtree per lobe.

    The radius grows with the number of points that a branch supplies, by the one power that leads
    from the terminal radius at one point to the root radius at all of them.
    """
    start, end, control, leaves = [], [], [], []
    ready = [(root_mm, group.mean(0) - root_mm, group, 0.42) for group in groups if len(group)]
    while ready:
        here, heading, points, reach = ready.pop()
        count = len(points)
        center = points.sum(0) / count
        there = points[0] if count == 1 else here + reach * (center - here)
        length = np.linalg.norm(there - here)
        bow = 0.2 * length * heading / (np.linalg.norm(heading) + 1e-6)
        start.append(here)
        end.append(there)
        control.append(here + bow if count < 200 else (here + there) / 2)
        leaves.append(count)
        if count == 1:
            continue
        direction = there - here
        spread = points - center
        # Split across the widest direction that is not the heading.
        axis = spread[np.argmax((spread * spread).sum(1))]
        axis = axis - direction * (axis @ direction) / (direction @ direction + 1e-6)
        order = np.argsort(spread @ axis)
        share = rng.uniform(0.55, 0.92)  # uneven: a trunk that goes on, with side branches
        cut = min(max(round(share * count), 1), count - 1)
        if rng.random() < 0.5:
            cut = count - cut
        for part in (order[:cut], order[cut:]):
            ready.append((there, direction, points[part], rng.uniform(0.3, 0.55)))
    total = sum(len(group) for group in groups)
    power = np.log(root_radius_mm / terminal_radius_mm) / np.log(total)
    radius = terminal_radius_mm * np.array(leaves) ** power
    return _bent(np.array(start), np.array(control), np.array(end), radius)


def _bent(start: np.ndarray, control: np.ndarray, end: np.ndarray, radius: np.ndarray) -> Capsules:
    """Quadratic curves (N, 3) each, cut into straight pieces, more for the long ones."""
    length = np.linalg.norm(end - start, axis=1)
    pieces = []
    for cuts, chosen in ((1, length < 4), (2, (length >= 4) & (length < 12)), (5, length >= 12)):
        t = np.linspace(0, 1, cuts + 1)[:, None, None]
        curve = (1 - t) ** 2 * start[chosen] + 2 * t * (1 - t) * control[chosen]
        curve = curve + t**2 * end[chosen]
        taper = radius[chosen] * np.linspace(1.0, 0.9, cuts + 1)[:, None]
        pieces.append(
            Capsules(
                curve[:-1].reshape(-1, 3),
                curve[1:].reshape(-1, 3),
                np.stack([taper[:-1].ravel(), taper[1:].ravel()], -1),
            )
        )
    return Capsules.join(pieces)
