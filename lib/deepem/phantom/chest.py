"""One synthetic chest CT with its truth, from one seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from pydicom.uid import generate_uid
from scipy import ndimage

from deepem.geometry import Grid
from deepem.nodule import Lobe, Nodule, SliceConvention, WeakLabel
from deepem.phantom.anatomy import Anatomy, make_anatomy
from deepem.phantom.lesions import paint_distractors, place_nodules
from deepem.phantom.parenchyma import paint_lungs
from deepem.phantom.raster import (
    Axes,
    between,
    blend,
    box_around,
    capsule_depth,
    occupancy,
    points_of,
    resample,
    shape_of,
    spacing_mm,
    sub_axes,
)
from deepem.phantom.trees import grow_trees

SIZES = ("mini", "full")
_NODULE_COUNTS = (0.15, 0.3, 0.28, 0.17, 0.1)  # share of the scans with 0, 1, ... nodules
_ADULT_WIDTH_MM = 330.0


@dataclass(frozen=True)
class PhantomNodule:
    """A nodule as drawn: kind, shape and attachment are members of the tuples in `lesions`."""

    nodule: Nodule
    kind: str
    shape: str
    attachment: str
    lobe: Lobe


@dataclass(frozen=True, eq=False)
class Phantom:
    """A synthetic CT and its truth.

    hu: (I, J, K) int16, axial, k = 0 at the feet. lobes: (I, J, K) uint8, 0 where there is no
    lung, 1..6 in the order of `Lobe`.
    """

    series_uid: str
    hu: np.ndarray
    grid: Grid
    lobes: np.ndarray
    nodules: tuple[PhantomNodule, ...]

    @property
    def weak_labels(self) -> tuple[WeakLabel, ...]:
        """What a record would say of each nodule: lobe, slice counted from the head, size, kind."""
        slices = self.grid.shape[2]
        return tuple(
            WeakLabel(
                series_uid=self.series_uid,
                lobe=item.lobe,
                slice_number=slices - self._slice_index(item.nodule),
                slice_convention=SliceConvention.ONE_AT_HEAD,
                diameter_mm=float(round(item.nodule.diameter_mm)),
                attenuation=item.kind,
                source="phantom",
            )
            for item in self.nodules
        )

    def _slice_index(self, nodule: Nodule) -> int:
        return round(self.grid.to_index(np.array(nodule.center_lps_mm))[2])


@dataclass(frozen=True)
class _Protocol:
    """How the scan is acquired: ``merged`` fine slices are averaged into one of ``slices``.

    scale: size of the patient relative to the standard adult.
    """

    scale: float
    in_plane: tuple[int, int]
    slices: int
    pixel_mm: float
    slice_mm: float
    merged: int
    blur_mm: float
    noise_hu: float
    isocenter_lps_mm: np.ndarray

    @property
    def axes(self) -> Axes:
        """Voxel centres around the isocentre."""
        return self._centered(self.slices, self.slice_mm)

    @property
    def fine_axes(self) -> Axes:
        """The same before slices are averaged."""
        return self._centered(self.slices * self.merged, self.slice_mm / self.merged)

    def _centered(self, slices: int, slice_mm: float) -> Axes:
        def axis(count: int, step_mm: float) -> np.ndarray:
            return (np.arange(count) - (count - 1) / 2) * step_mm

        columns, rows = self.in_plane
        return axis(columns, self.pixel_mm), axis(rows, self.pixel_mm), axis(slices, slice_mm)


def _draw_protocol(rng: np.random.Generator, size: str) -> _Protocol:
    if size == "mini":
        scale = 150 / _ADULT_WIDTH_MM * rng.uniform(0.95, 1.03)
        in_plane, pixel_mm, height_mm = (160, 128), 1.0, 128.0
        slice_mm = float(rng.choice((1.0, 1.25, 2.0, 2.5), p=(0.55, 0.15, 0.15, 0.15)))
    else:
        scale = rng.uniform(0.9, 1.06)
        narrowest = 1.04 * scale * _ADULT_WIDTH_MM / 512  # the body must fit
        in_plane, pixel_mm = (512, 512), round(max(rng.uniform(0.65, 0.8), narrowest), 4)
        height_mm = 292 * scale
        slice_mm = float(rng.choice((1.25, 2.0, 2.5), p=(0.4, 0.2, 0.4)))
    return _Protocol(
        scale=scale,
        in_plane=in_plane,
        slices=round(height_mm / slice_mm),
        pixel_mm=pixel_mm,
        slice_mm=slice_mm,
        merged=2 if slice_mm >= 2 else 1,
        blur_mm=rng.uniform(0.45, 0.8),
        noise_hu=float(np.exp(rng.uniform(np.log(10), np.log(50)))),
        isocenter_lps_mm=np.round(rng.uniform((-15, -20, -400), (15, 20, -50)), 2),
    )


def make_phantom(seed: int, size: str = "mini", nodule_count: int | None = None) -> Phantom:
    """Make the chest of ``seed``: the same arguments give the same voxels and truth.

    size: "mini" (160 x 128 pixels of 1 mm, 128 mm high, anatomy scaled down but not the nodules)
    or "full" (512 x 512 pixels, a patient). nodule_count: None draws 0..4; a chest too crowded for
    all of them gets fewer.
    """
    if size not in SIZES:
        raise ValueError(f"size: expected one of {SIZES}, got {size!r}")
    rng = np.random.default_rng(np.random.SeedSequence((seed, SIZES.index(size))))
    protocol = _draw_protocol(rng, size)
    drawn = int(rng.choice(len(_NODULE_COUNTS), p=_NODULE_COUNTS))
    count = drawn if nodule_count is None else nodule_count
    # A stream for each step: the chest stays the same when only the nodules change.
    rng_anatomy, rng_bones, rng_trees, rng_nodules, rng_paint, rng_noise = rng.spawn(6)

    fine = protocol.fine_axes
    coarse_step = 2.0 if size == "mini" else 3.0
    coarse: Axes = tuple(
        np.linspace(axis[0], axis[-1], int(np.ptp(axis) / coarse_step) + 2) for axis in fine
    )
    anatomy = make_anatomy(rng_anatomy, coarse, protocol.scale)
    hu, in_lung = _paint_body(rng_bones, anatomy, fine)
    trees = grow_trees(rng_trees, anatomy)
    placed = place_nodules(rng_nodules, count, anatomy, trees.vessels)
    paint_lungs(rng_paint, hu, in_lung, anatomy, fine, trees)
    paint_distractors(rng_paint, hu, fine, in_lung, anatomy, trees.vessels)
    for lesion, _, _ in placed:
        lesion.paint(hu, fine, in_lung)
    del in_lung
    hu = _acquire(rng_noise, hu, protocol)

    axes = protocol.axes
    lobes = _lobes(anatomy, axes)
    return Phantom(
        series_uid=generate_uid(entropy_srcs=["phantom", size, str(seed), str(nodule_count)]),
        hu=hu,
        grid=_grid(protocol, axes),
        lobes=lobes,
        nodules=tuple(
            PhantomNodule(
                nodule=Nodule(tuple(center + protocol.isocenter_lps_mm), diameter),
                kind=lesion.kind,
                shape=lesion.shape,
                attachment=lesion.attachment,
                lobe=_lobe_at(lobes, axes, center),
            )
            for lesion, center, diameter in placed
        ),
    )


def _lobes(anatomy: Anatomy, axes: Axes) -> np.ndarray:
    """Lobe map on ``axes``."""
    lobes = np.zeros(shape_of(axes), np.uint8)
    box = box_around(anatomy.lung_mm < 0, anatomy.axes, axes)
    lobes[box] = anatomy.lobes(sub_axes(axes, box))
    return lobes


def _grid(protocol: _Protocol, axes: Axes) -> Grid:
    affine = np.diag([protocol.pixel_mm, protocol.pixel_mm, protocol.slice_mm, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes] + protocol.isocenter_lps_mm
    return Grid(affine, shape_of(axes))


def _lobe_at(lobes: np.ndarray, axes: Axes, center: np.ndarray) -> Lobe:
    """Find the lobe of the lung voxel that is nearest to a point in or at the lung."""
    box = between(axes, center - 4, center + 4)
    offset = points_of(sub_axes(axes, box)) - center
    distance = np.where(lobes[box] > 0, (offset**2).sum(-1), np.inf)
    return list(Lobe)[int(lobes[box].ravel()[distance.argmin()]) - 1]


def _paint_body(
    rng: np.random.Generator, anatomy: Anatomy, axes: Axes
) -> tuple[np.ndarray, np.ndarray]:
    """Everything but the lungs in HU, and the lungs' share of each voxel; both float32."""
    edge = float(spacing_mm(axes).mean())
    hu = resample(anatomy.soft_hu, anatomy.axes, axes)
    depth = capsule_depth(axes, anatomy.ribs, edge)
    cortex = 0.3 * float(anatomy.ribs.radius_mm.mean())
    blend(hu, occupancy(depth, edge), rng.uniform(420, 700))
    blend(hu, occupancy(depth - cortex, edge), rng.uniform(80, 200))
    del depth

    for distance in (anatomy.gas_mm, -anatomy.body_mm):
        box = box_around(distance < 2, anatomy.axes, axes)
        share = occupancy(-resample(distance, anatomy.axes, sub_axes(axes, box)), edge)
        blend(hu[box], share, -1000.0)
    return hu, occupancy(-resample(anatomy.lung_mm, anatomy.axes, axes), edge)


def _acquire(rng: np.random.Generator, hu: np.ndarray, protocol: _Protocol) -> np.ndarray:
    """Blur, average slices, add correlated noise; int16."""
    pixel, step = protocol.pixel_mm, protocol.slice_mm / protocol.merged
    sigma = (protocol.blur_mm / pixel, protocol.blur_mm / pixel, 0.6 * protocol.blur_mm / step)
    hu = ndimage.gaussian_filter(hu, sigma, truncate=3.0)
    if protocol.merged > 1:
        hu = hu.reshape(*hu.shape[:2], protocol.slices, protocol.merged).mean(-1)
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    # A smoothing kernel minus a wider one: little noise at the lowest frequencies, as in CT.
    sharp = ndimage.gaussian_filter(noise, (0.65, 0.65, 0.35), truncate=3.0)
    sharp -= 0.6 * ndimage.uniform_filter(sharp, (5, 5, 1))
    sharp *= np.float32(protocol.noise_hu / sharp[::4, ::4, ::4].std())
    x = np.linspace(-1, 1, hu.shape[0], dtype=np.float32)[:, None, None]
    y = np.linspace(-1, 1, hu.shape[1], dtype=np.float32)[:, None]
    z = np.linspace(-1, 1, hu.shape[2], dtype=np.float32)
    # More noise in the middle, where less radiation arrives, and behind the shoulders.
    sharp *= 1.15 - 0.45 * (x**2 + y**2) + 0.5 * np.maximum(z - 0.5, 0)
    hu += sharp
    return np.clip(np.rint(hu), -1024, 3071).astype(np.int16)
