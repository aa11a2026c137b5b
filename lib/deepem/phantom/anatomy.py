"""Body, chest wall, mediastinum, abdomen, lungs and lobes of a synthetic chest.

Everything smooth is described once, in the millimetres of a standard adult ("adult mm": origin at
mid-chest, x to the left, y to the back, z to the head), on a coarse grid; a scale turns it into the
mm of the patient. Distances are negative inside and only exact near the surface.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from deepem.nodule import Lobe
from deepem.phantom.raster import (
    Axes,
    Capsules,
    blend,
    capsule_depth,
    occupancy,
    polyline_distance,
    resample,
    sample,
    smooth_noise,
    spacing_mm,
)

_Row = tuple[float, ...]
_Path = tuple[tuple[float, float, float], ...]

# Inner chest wall at heights z: half width, half depth, and the y of the centre. Adult mm.
_CAVITY_Z = (-170, -100, -50, 0, 50, 80, 100, 112, 121)
_CAVITY_HALF_WIDTH = (146, 146, 142, 135, 117, 97, 76, 53, 10)
_CAVITY_HALF_DEPTH = (101, 101, 99, 92, 79, 65, 50, 35, 8)
_CAVITY_Y = (0, 0, 0, 0, 6, 14, 20, 24, 26)
_BODY_Z = (-170, -80, 0, 60, 110, 170)
_BODY_HALF_WIDTH = (158, 162, 165, 171, 180, 165)
_BODY_HALF_DEPTH = (118, 119, 117, 110, 95, 80)
_BODY_Y = (2, 2, 3, 8, 16, 20)

_AORTA = ((5, -22, -8), (-13, -22, 32), (-2, -8, 56), (18, 22, 60), (28, 40, 45), (28, 44, 0),
          (22, 42, -60), (6, 36, -150))  # fmt: skip
_PULMONARY_TRUNK = ((18, -38, 0), (20, -14, 24), (44, 10, 20))
_RIGHT_PULMONARY = ((18, -14, 20), (-12, -4, 15), (-42, 4, 8))
_CAVA = ((-25, 18, -150), (-24, 12, -60), (-25, -12, 0), (-25, -14, 72), (-30, -4, 150))
_BRACHIOCEPHALIC = ((-25, -16, 72), (8, -22, 78), (34, -8, 95), (40, -2, 150))
_CAROTID = ((10, 6, 62), (16, 6, 100), (22, 4, 150))
_PULMONARY_VEINS = ((-48, 6, -14), (0, 14, -16), (48, 10, -12))
_GREAT_VESSELS = (
    (_AORTA, 13.5),
    (_PULMONARY_TRUNK, 11.0),
    (_RIGHT_PULMONARY, 10.0),
    (_CAVA, 9.5),
    (_BRACHIOCEPHALIC, 7.0),
    (_CAROTID, 5.0),
    (_PULMONARY_VEINS, 7.0),
)  # course and radius, adult mm
_OESOPHAGUS = ((4, 34, 150), (3, 34, 20), (12, 30, -100))
CARINA = (0.0, 14.0, 42.0)
TRACHEA_TOP = (0.0, 6.0, 170.0)
_PLEURA_MM = 1.5  # soft tissue between a rib and the lung
HILUM = {-1: (-44.0, 6.0, 8.0), 1: (46.0, 9.0, 14.0)}  # by the sign of x: right, left


@dataclass(frozen=True, eq=False)
class Anatomy:
    """Smooth parts of one chest on a coarse grid; all arrays share its shape, all lengths in mm.

    ``lung_mm``, ``body_mm`` and ``gas_mm`` (stomach) are signed distances, negative inside.
    ``side_mm``, ``oblique_mm`` and ``horizontal_mm`` tell the lobes apart: left of the midline,
    above the oblique fissure, and above the horizontal one (in the left lung the border between
    upper lobe and lingula, where there is no fissure).
    """

    axes: Axes
    scale: float
    soft_hu: np.ndarray
    body_mm: np.ndarray
    lung_mm: np.ndarray
    gas_mm: np.ndarray
    side_mm: np.ndarray
    oblique_mm: np.ndarray
    horizontal_mm: np.ndarray
    ribs: Capsules
    blood_hu: float

    def lobes(self, axes: Axes | None = None) -> np.ndarray:
        """Lobe of every voxel of ``axes``, or of the coarse grid: 0 is no lung, 1..6 a `Lobe`."""
        fields = [self.lung_mm, self.side_mm, self.oblique_mm, self.horizontal_mm]
        if axes is not None:
            fields = [resample(field, self.axes, axes) for field in fields]
        return _lobe_codes(*fields)

    def lung_depth_mm(self, points_mm: np.ndarray) -> np.ndarray:
        """Depth below the pleura at points (..., 3), negative outside of the lungs."""
        return -sample(self.lung_mm, self.axes, points_mm)


def _lobe_codes(
    lung_mm: np.ndarray, side_mm: np.ndarray, oblique_mm: np.ndarray, horizontal_mm: np.ndarray
) -> np.ndarray:
    order = {lobe: number for number, lobe in enumerate(Lobe, start=1)}
    left_lobes = (Lobe.LLL, Lobe.LLL, Lobe.LINGULA, Lobe.LUL)
    right_lobes = (Lobe.RLL, Lobe.RLL, Lobe.RML, Lobe.RUL)
    table = np.array([0] * 8 + [order[lobe] for lobe in (*right_lobes, *left_lobes)], np.uint8)
    code = (horizontal_mm > 0).view(np.uint8)
    for bit, chosen in enumerate((oblique_mm > 0, side_mm > 0, lung_mm < 0), start=1):
        code |= chosen.view(np.uint8) << np.uint8(bit)
    return table[code]


def _smooth_union(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    """Take the smaller of both, with a fillet of ``width``."""
    fillet = np.maximum(width - np.abs(a - b), 0)
    return np.minimum(a, b) - fillet**2 / (4 * width)


@dataclass(frozen=True, eq=False)
class _Frame:
    """Where the coarse voxels are in a standard adult.

    x, y, z are bent by one smooth warp, so every chest is a little crooked, without collisions.
    ``ripple`` is unit noise that roughens surfaces.
    """

    adult: Axes
    x: np.ndarray
    y: np.ndarray
    z: np.ndarray
    ripple: np.ndarray

    @classmethod
    def draw(cls, rng: np.random.Generator, adult: Axes) -> _Frame:
        x, y, z = (
            grid * np.float32(rng.uniform(0.95, 1.05))
            + np.float32(rng.uniform(3, 6)) * smooth_noise(rng, adult, 75.0)
            for grid in np.meshgrid(*(axis.astype(np.float32) for axis in adult), indexing="ij")
        )
        return cls(adult, x, y, z, smooth_noise(rng, adult, 18.0))

    @property
    def step(self) -> np.ndarray:
        return spacing_mm(self.adult)

    def ellipsoid(
        self, center: tuple[float, float, float], radii: tuple[float, float, float]
    ) -> np.ndarray:
        grids = zip((self.x, self.y, self.z), center, radii, strict=True)
        return (np.sqrt(sum(((g - c) / r) ** 2 for g, c, r in grids)) - 1) * min(radii)

    def tube(self, rng: np.random.Generator, path: _Path, radius: float) -> np.ndarray:
        # The path is given in the bent frame: look up, by fixed point, where it lies on the grid.
        wanted = np.array(path, np.float32)
        there = wanted
        for _ in range(2):
            bent = np.stack([sample(g, self.adult, there) for g in (self.x, self.y, self.z)], -1)
            there = there + wanted - bent
        return polyline_distance(self.adult, there) - radius * rng.uniform(0.9, 1.1)

    def as_distance(self, implicit: np.ndarray) -> np.ndarray:
        """Implicit function -> signed distance, to first order around its zero."""
        slope = np.sqrt(sum(g**2 for g in np.gradient(implicit, *self.step)))
        return (implicit / np.maximum(slope, 1e-3)).astype(np.float32)

    def trunk(self, heights: _Row, width: _Row, depth: _Row, center_y: _Row) -> np.ndarray:
        """Signed distance to a body that is a superellipse in every axial plane."""
        a, b, c = (
            np.interp(self.z, heights, table).astype(np.float32)
            for table in (width, depth, center_y)
        )
        y = self.y - c
        relative = (np.abs(self.x / a) ** 2.4 + np.abs(y / b) ** 2.4) ** (1 / 2.4)
        radial = np.hypot(self.x, y) * (1 - 1 / np.maximum(relative, 0.05))
        # Where the trunk narrows steeply the in-plane distance is too long, near the surface.
        slope = np.sqrt(sum(g**2 for g in np.gradient(radial, *self.step)))
        return radial / (1 + np.maximum(slope - 1, 0) * np.exp(-np.abs(radial) / 20))


@dataclass(frozen=True, eq=False)
class _Mediastinum:
    """Signed distances in adult mm: heart muscle and chambers, all blood, gullet, the whole."""

    heart: np.ndarray
    blood: np.ndarray
    gullet: np.ndarray
    whole: np.ndarray


def make_anatomy(rng: np.random.Generator, axes: Axes, scale: float) -> Anatomy:
    """Draw a chest with random proportions on the coarse ``axes`` (patient mm)."""
    adult: Axes = (axes[0] / scale, axes[1] / scale, axes[2] / scale)
    frame = _Frame.draw(rng, adult)
    cavity = frame.trunk(_CAVITY_Z, _CAVITY_HALF_WIDTH, _CAVITY_HALF_DEPTH, _CAVITY_Y)
    cavity += 1.2 * frame.ripple
    body = frame.trunk(_BODY_Z, _BODY_HALF_WIDTH, _BODY_HALF_DEPTH, _BODY_Y)
    body = np.minimum(body, cavity - 16) - rng.uniform(-6, 12)
    spine_y = 60 + 8 * np.cos(frame.z / 110)
    mediastinum = _mediastinum(rng, frame, spine_y)
    diaphragm, left_dome_z = _diaphragm(rng, frame)
    lung = -_smooth_union(-np.maximum(cavity, diaphragm), mediastinum.whole, 5)
    oblique, horizontal = _fissures(rng, frame)
    gas = frame.ellipsoid((70, -45, left_dome_z - 28), (30, 30, rng.uniform(12, 20)))

    contrast = rng.random() < 0.4
    blood_hu = rng.uniform(110, 260) if contrast else rng.uniform(30, 55)
    soft = _chest_wall(rng, frame, cavity, body)
    _add_abdomen(rng, soft, frame, cavity, diaphragm)
    soft[(np.maximum(cavity, diaphragm) < 2) & (mediastinum.whole < 8)] = -95  # fat
    _fill(soft, mediastinum.gullet, 30.0)
    _fill(soft, mediastinum.blood, blood_hu)
    heart_wall = np.maximum(mediastinum.heart, -mediastinum.heart - 9)
    _fill(soft, heart_wall, min(blood_hu, 90.0))
    _add_spine(rng, soft, frame, spine_y)
    _add_flat_bones(soft, frame, cavity)

    ribs = _ribs(rng, adult, cavity, scale)
    lifted = capsule_depth(axes, ribs, _PLEURA_MM + 8) + _PLEURA_MM
    return Anatomy(
        axes=axes,
        scale=scale,
        soft_hu=soft.astype(np.float32),
        body_mm=(body * scale).astype(np.float32),
        lung_mm=np.maximum(lung * scale, lifted).astype(np.float32),
        gas_mm=(np.maximum(gas, 7 - diaphragm) * scale).astype(np.float32),
        side_mm=frame.x * np.float32(scale),
        oblique_mm=oblique * np.float32(scale),
        horizontal_mm=horizontal * np.float32(scale),
        ribs=ribs,
        blood_hu=blood_hu,
    )


def _mediastinum(rng: np.random.Generator, frame: _Frame, spine_y: np.ndarray) -> _Mediastinum:
    x, y = frame.x, frame.y
    ventricles = _smooth_union(
        frame.ellipsoid((2, -26, -42), (44, 40, 46)),
        frame.ellipsoid((38, -22, -52), (48, 42, 40)),
        16,
    )
    heart = np.minimum(ventricles - rng.uniform(-5, 6), frame.ellipsoid((4, 12, -16), (32, 20, 20)))
    blood = np.minimum.reduce([heart, *(frame.tube(rng, *vessel) for vessel in _GREAT_VESSELS)])
    gullet = frame.tube(rng, _OESOPHAGUS, 7)

    rough = 4 * np.maximum(frame.ripple, 0)
    trachea = frame.tube(rng, (CARINA, TRACHEA_TOP), 12)
    spine = np.hypot(x, y - spine_y - 4) - 25 - rough
    in_front = np.maximum(np.abs(x - 3) - 5 - rough, y - 20)
    behind = np.maximum(np.abs(x) - 24, spine_y - y)
    upper = frame.ellipsoid((0, 2, 105), (33, 36, 62))
    tubes = _smooth_union(np.minimum(blood, gullet) - 3, np.minimum(trachea, spine), 9)
    rest = np.minimum.reduce([in_front, behind, upper])
    return _Mediastinum(heart, blood, gullet, _smooth_union(tubes, rest, 9))


def _diaphragm(rng: np.random.Generator, frame: _Frame) -> tuple[np.ndarray, float]:
    """Signed distance, negative above the diaphragm, and the z of the left dome; adult mm."""
    right_top, left_top = rng.normal(-46, 8), rng.normal(-58, 8)
    left = frame.x > 0
    squared = ((frame.x - np.where(left, 72, -70)) / 97) ** 2 + ((frame.y + 14) / 112) ** 2
    dome = np.where(left, left_top, right_top) - rng.uniform(60, 90) * squared**1.1
    return frame.as_distance(dome + 3.5 * frame.ripple - frame.z), left_top


def _fissures(rng: np.random.Generator, frame: _Frame) -> tuple[np.ndarray, np.ndarray]:
    """Signed distance above the oblique and the horizontal fissure; adult mm."""
    x, y, z = frame.x, frame.y, frame.z
    left = x > 0
    bend = 6 * smooth_noise(rng, frame.adult, 50.0)
    tilt = np.where(left, *rng.uniform(0.8, 1.05, 2))
    offset = np.where(left, rng.normal(-12, 8), rng.normal(-16, 8))
    oblique_z = offset + tilt * y + 0.1 * np.abs(x) - 7 + bend
    lateral = np.where(left, 0, 0.05 * (x + 80))
    horizontal_z = np.where(left, *rng.normal(4, 6, 2)) + lateral + 0.12 * y + bend
    return frame.as_distance(z - oblique_z), frame.as_distance(z - horizontal_z)


def _fill(hu: np.ndarray, distance: np.ndarray, value: np.ndarray | float) -> None:
    """Replace the inside of a part in place, with an edge of 3 mm."""
    blend(hu, occupancy(-distance, 3.0), value)


def _chest_wall(
    rng: np.random.Generator, frame: _Frame, cavity: np.ndarray, body: np.ndarray
) -> np.ndarray:
    """Fat, muscle with fat planes, and skin; HU."""
    x, y, ripple = frame.x, frame.y, frame.ripple
    hu = -100 + 12 * ripple
    back = 9 * ((y > 60) & (np.abs(x) < 60))
    thick_mm = 17 + 5 * ripple + back + 6 * np.exp(-((x / 90) ** 2))
    planes = (np.abs(smooth_noise(rng, frame.adult, 22.0)) < 0.12) & (cavity > 4)
    _fill(hu, cavity - thick_mm, np.where(planes, -50, 52))
    blend(hu, occupancy(body + 2.2, 1.5), 20.0)
    return hu


def _add_abdomen(
    rng: np.random.Generator,
    hu: np.ndarray,
    frame: _Frame,
    cavity: np.ndarray,
    diaphragm: np.ndarray,
) -> None:
    """Fat, stomach, spleen, liver and the diaphragm itself, in place."""
    below = np.maximum(cavity + 2, 2 - diaphragm)
    _fill(hu, below, -100.0)
    _fill(hu, np.maximum(below, frame.ellipsoid((62, -30, -100), (50, 52, 48))), 25.0)
    _fill(hu, np.maximum(below, frame.ellipsoid((92, 42, -95), (42, 48, 48))), 48.0)
    liver_edge = 0.8 * frame.x + 0.15 * frame.y - 12 - 5 * frame.ripple
    _fill(hu, np.maximum(below, liver_edge), rng.uniform(45, 70))
    _fill(hu, np.abs(below) - 2.5, 45.0)


def _add_spine(
    rng: np.random.Generator, hu: np.ndarray, frame: _Frame, spine_y: np.ndarray
) -> None:
    """Vertebrae with discs, canal and processes, repeated every 24 mm, in place."""
    x, back = frame.x, frame.y - spine_y
    height = np.abs(np.mod(frame.z, 24) - 12)
    disc = height > 9.5
    body = np.hypot(x / 1.2, back) - 17
    canal = np.hypot(x, back - 27) - 9
    lamina = np.maximum(np.abs(canal - 3) - 3, height - 8)
    spinous = np.maximum.reduce([np.abs(x) - 3.5, np.abs(back - 50) - 14, height - 7])
    transverse = np.maximum.reduce(
        [np.abs(back - 26 - 0.2 * np.abs(x)) - 5, np.abs(x) - 32, height - 6]
    )
    _fill(hu, body, np.where(disc, 70, rng.uniform(130, 220)))
    _fill(hu, np.abs(body + 1.5) - 2.5 + 5 * disc, 420.0)
    _fill(hu, np.minimum.reduce([lamina, spinous, transverse]), 380.0)
    _fill(hu, canal, 25.0)


def _add_flat_bones(hu: np.ndarray, frame: _Frame, cavity: np.ndarray) -> None:
    """Sternum and shoulder blades, in place."""
    x, y, z = frame.x, frame.y, frame.z
    sternum = np.maximum.reduce(
        [np.abs(cavity - 11) - 6, np.abs(x) - 17, y + 20, np.abs(z - 10) - 70]
    )
    plate = np.abs(cavity - 21 - 0.12 * np.abs(z - 60)) - 3.5
    outline = np.hypot((np.abs(x) - 92) / 1.1, (z - 58) / 1.6) - 30
    for bone in (sternum, np.maximum.reduce([plate, outline, 20 - y])):
        _fill(hu, bone, 480.0)
        _fill(hu, bone + 2.5, 170.0)


def _ribs(rng: np.random.Generator, adult: Axes, cavity: np.ndarray, scale: float) -> Capsules:
    """Ribs in mm, from the spine around the chest wall and running down."""
    spacing = rng.uniform(21, 25)
    calibre = rng.uniform(4.8, 5.8) * scale**0.8
    radius = np.arange(8.0, 200.0, 1.5)
    ribs = []
    for number in range(11):
        angle = np.deg2rad(np.linspace(17, 148 if number < 7 else 125 - 12 * (number - 7), 34))
        drop = (36 + 5 * number) * (1 - np.cos(angle)) / 2 * 1.15
        z = 112 - spacing * number - drop + rng.normal(0, 2)
        center_y = np.interp(z, _CAVITY_Z, _CAVITY_Y)
        for side in (-1, 1):
            direction = np.stack([side * np.sin(angle), np.cos(angle)], -1)
            ray = np.empty((len(angle), len(radius), 3))
            ray[..., :2] = radius[None, :, None] * direction[:, None]
            ray[..., 1] += center_y[:, None]
            ray[..., 2] = z[:, None]
            wall = (sample(cavity, adult, ray) > 3.5).argmax(1)
            path = ray[np.arange(len(angle)), wall] * scale
            inside = (z < adult[2][-1] + 10) & (z > adult[2][0] - 10) & (wall > 0)
            ribs.append(Capsules.along(path[inside], np.full(inside.sum(), calibre)))
    return Capsules.join(ribs)
