"""Nodules as voxels: spheres drawn on the grid of a CT, for viewers that show only masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk

from deepem.files import atomic_path
from deepem.geometry import RAS_TO_LPS, Grid
from deepem.nodule import Nodule, Proposal

BANDS = {"nodule p>=0.9": (2, 0.9), "nodule p>=0.7": (3, 0.7), "nodule p<0.7": (4, 0.0)}
"""Name of a confidence band -> its value in a mask and its lowest probability, best first."""


def band_values(findings: Iterable[Proposal]) -> list[int]:
    """The value in `BANDS` of each finding."""
    return [
        next(value for value, lowest in BANDS.values() if finding.probability >= lowest)
        for finding in findings
    ]


def nodule_mask(
    nodules: Sequence[Nodule], grid: Grid, values: Sequence[int] | None = None
) -> np.ndarray:
    """Spheres on any grid: (I, J, K) uint8, 0 where there is none.

    values: 1..255, one for each nodule; without, all are 1. Where nodules overlap, the first of the
    list is on top. What lies outside the grid is not drawn.

    A voxel is drawn if its centre lies in the sphere, but the slice nearest to the middle of a
    nodule counts as going through it, and in every slice so do the nearest row and column. So the
    largest drawn outline has the diameter of the nodule, within one voxel along each axis, however
    thick the slices are, and a nodule between two slices is drawn in the nearer one. The price is
    volume: one thick slice holds more of a disc than the sphere has.
    """
    values = [1] * len(nodules) if values is None else values
    if len(values) != len(nodules) or not all(1 <= value <= 255 for value in values):
        raise ValueError(f"values: expected {len(nodules)} of 1..255, got {list(values)}")
    mask = np.zeros(grid.shape, np.uint8)
    linear = grid.affine_lps_mm[:3, :3]
    # Along the columns of Q: the row of voxels, the column across it, the normal of the slice.
    q, r = np.linalg.qr(linear)
    half_mm = np.abs(np.diag(r)) / 2
    reach_index = np.linalg.norm(np.linalg.inv(linear), axis=1)
    for nodule, value in reversed(list(zip(nodules, values, strict=True))):
        radius_mm = nodule.diameter_mm / 2
        center = grid.to_index(np.array(nodule.center_lps_mm))
        low = np.floor(center - radius_mm * reach_index - 1).astype(int)
        high = np.ceil(center + radius_mm * reach_index + 1).astype(int)
        low, high = np.maximum(low, 0), np.minimum(high + 1, grid.shape)
        if (low >= high).any():
            continue
        box = tuple(map(slice, low, high))
        index = np.moveaxis(np.mgrid[box], 0, -1)
        offset_mm = (grid.to_world(index) - nodule.center_lps_mm) @ q
        offset_mm[(offset_mm > -half_mm) & (offset_mm <= half_mm)] = 0
        mask[box][np.linalg.norm(offset_mm, axis=-1) <= radius_mm] = value
    return mask


def write_mask(path: Path | str, mask: np.ndarray, grid: Grid, compress: bool = True) -> None:
    """Write a mask (I, J, K) as NIfTI or NRRD, voxel for voxel as it is.

    compress: of NRRD; whether NIfTI is, its name says.
    """
    with atomic_path(path) as aside:
        if aside.name.endswith((".nii", ".nii.gz")):
            # SimpleITK cannot write the sheared grid of a tilted gantry.
            image = nib.Nifti1Image(mask, RAS_TO_LPS @ grid.affine_lps_mm)
            image.header.set_xyzt_units("mm")
            nib.save(image, aside)
        else:
            volume = sitk.GetImageFromArray(mask.transpose(2, 1, 0))
            volume.SetSpacing(grid.spacing_mm.tolist())
            volume.SetOrigin(grid.affine_lps_mm[:3, 3].tolist())
            volume.SetDirection((grid.affine_lps_mm[:3, :3] / grid.spacing_mm).ravel().tolist())
            sitk.WriteImage(volume, str(aside), useCompression=compress)
