"""Where the lungs are: a coarse mask, its bounding box, and a distance for every point."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import ndimage
from skimage import measure, segmentation

from deepem.geometry import Grid
from deepem.volume import Volume

logger = logging.getLogger(__name__)

_SPACING_MM = 3.0
_TISSUE_HU = -500.0
_MIN_LUNG_ML = 40.0
"""A lung of an adult holds litres, of a small child 100 ml; the trachea stays below."""

_AIRWAY_SHARE = 0.25
"""Radius of the trachea against that of the largest sphere in the lungs, in adult and child."""

_PLEURA_MM = 9.0
"""Bays this deep in the lung surface are closed: juxta-pleural nodules and hilar vessels."""


@dataclass(frozen=True, eq=False)
class Lungs:
    """Both lungs of a scan.

    mask: (I, J, K) bool on ``grid`` (coarse, axes of the volume); vessels and nodules filled in.
    lowest_lps_mm, highest_lps_mm: (3,) bounding box in the world.
    found: False when nothing lung-like was there; then mask and box are the whole volume.
    """

    mask: np.ndarray
    grid: Grid
    lowest_lps_mm: np.ndarray
    highest_lps_mm: np.ndarray
    found: bool

    @cached_property
    def _distance_mm(self) -> np.ndarray:
        return _distance_to(self.mask, self.grid).astype(np.float32)

    def distance_mm(self, point_lps_mm: np.ndarray) -> np.ndarray:
        """(..., 3) LPS mm -> (...) distance to the nearest lung voxel, 0 inside the lungs."""
        index = np.rint(self.grid.to_index(point_lps_mm)).astype(int)
        index = np.clip(index, 0, np.array(self.grid.shape) - 1)
        return self._distance_mm[index[..., 0], index[..., 1], index[..., 2]]

    def relative(self, point_lps_mm: np.ndarray) -> np.ndarray:
        """(..., 3) LPS mm -> (..., 3) position in the bounding box, 0..1 along each world axis."""
        return (point_lps_mm - self.lowest_lps_mm) / (self.highest_lps_mm - self.lowest_lps_mm)


def find_lungs(volume: Volume) -> Lungs:
    """Air inside the body, on a grid of about 3 mm; the whole volume when there is none.

    Outside air is what touches the four sides of the volume (not its top and bottom, where lungs
    and trachea may be cut). Of the rest the largest part is lung, and so is any part of at least
    a fifth of it; the airways are cut off and the surface is closed over 9 mm.
    """
    strides = np.maximum(np.rint(_SPACING_MM / volume.grid.spacing_mm), 1).astype(int)
    coarse = volume.hu[:: strides[0], :: strides[1], :: strides[2]].astype(np.float32)
    affine = volume.grid.affine_lps_mm.copy()
    affine[:3, :3] *= strides
    grid = Grid(affine, coarse.shape)
    head_feet = int(np.abs(affine[2, :3] / grid.spacing_mm).argmax())
    mask = _inner_air(ndimage.gaussian_filter(coarse, 0.7) < _TISSUE_HU, head_feet, grid)
    if mask is None:
        logger.warning("%s: no lungs found, the whole volume is searched", volume.series_uid)
        lowest, highest = volume.grid.extent_lps_mm()
        return Lungs(np.ones(grid.shape, bool), grid, lowest, highest, found=False)
    points = grid.to_world(np.argwhere(mask))
    return Lungs(mask, grid, points.min(0), points.max(0), found=True)


def _inner_air(air: np.ndarray, head_feet: int, grid: Grid) -> np.ndarray | None:
    # A thin chest wall has holes at 3 mm: without its outermost voxels the air does not leak.
    labels = measure.label(ndimage.binary_erosion(air, border_value=1), connectivity=1)
    labels = np.where(air, segmentation.expand_labels(labels, 4), 0)
    sides = [axis for axis in range(3) if axis != head_feet]
    faces = [np.take(labels, end, axis) for axis in sides for end in (0, -1)]
    volumes_ml = np.bincount(labels.ravel()) * abs(np.linalg.det(grid.affine_lps_mm[:3, :3])) / 1e3
    volumes_ml[0] = 0
    volumes_ml[np.unique(np.concatenate([face.ravel() for face in faces]))] = 0
    if volumes_ml.max() < _MIN_LUNG_ML:
        return None
    lungs = (volumes_ml >= volumes_ml.max() / 5)[labels]
    # Cut off the airways: keep what lies close to where a sphere wider than the trachea fits.
    depth_mm = ndimage.distance_transform_edt(lungs, sampling=grid.spacing_mm)
    airway_mm = _AIRWAY_SHARE * depth_mm.max()
    lungs &= _distance_to(depth_mm > airway_mm, grid) <= 2.5 * airway_mm
    closed = _distance_to(lungs, grid) <= _PLEURA_MM
    return _distance_to(~closed, grid) > _PLEURA_MM


def _distance_to(mask: np.ndarray, grid: Grid) -> np.ndarray:
    """(I, J, K) mm from every voxel to the nearest one of the mask; infinite for an empty mask."""
    if not mask.any():
        return np.full(mask.shape, np.inf)
    return ndimage.distance_transform_edt(~mask, sampling=grid.spacing_mm)
