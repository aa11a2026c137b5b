"""Frames and shapes: voxel index <-> world, sphere <-> box.

The world is DICOM LPS in millimetres: x grows to the patient's Left, y to Posterior, z to Superior.
Arrays are ``volume[i, j, k]``; an index is a float triple in that order, integers at voxel centres.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Turns an affine into RAS mm (NIfTI) into one into LPS mm, and back."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxel grid of one scan; any invertible affine, so oblique, flipped and tilted ones too.

    affine_lps_mm: (4, 4), index of a voxel centre -> LPS mm. shape: voxels along i, j, k.
    """

    affine_lps_mm: np.ndarray
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        affine = np.array(self.affine_lps_mm, dtype=np.float64)
        if affine.shape != (4, 4):
            raise ValueError(f"affine_lps_mm: expected shape (4, 4), got {affine.shape}")
        if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError(
                f"affine_lps_mm: expected finite and invertible, got {affine.tolist()}"
            )
        shape = tuple(int(size) for size in self.shape)
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"shape: expected three positive sizes, got {self.shape}")
        affine.setflags(write=False)
        object.__setattr__(self, "affine_lps_mm", affine)
        object.__setattr__(self, "shape", shape)

    @classmethod
    def axis_aligned(
        cls, origin_lps_mm: np.ndarray, spacing_mm: float, shape: tuple[int, ...]
    ) -> Grid:
        """An isotropic grid whose axes i, j, k run along world x, y, z from ``origin_lps_mm``."""
        affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
        affine[:3, 3] = origin_lps_mm
        return cls(affine, shape)

    @cached_property
    def _inverse(self) -> np.ndarray:
        return np.linalg.inv(self.affine_lps_mm)

    @property
    def spacing_mm(self) -> np.ndarray:
        """(3,) distance between neighbouring voxels along i, j, k."""
        return np.linalg.norm(self.affine_lps_mm[:3, :3], axis=0)

    def to_world(self, index: np.ndarray) -> np.ndarray:
        """(..., 3) index -> (..., 3) LPS mm."""
        return np.asarray(index) @ self.affine_lps_mm[:3, :3].T + self.affine_lps_mm[:3, 3]

    def to_index(self, point_lps_mm: np.ndarray) -> np.ndarray:
        """(..., 3) LPS mm -> (..., 3) index, not rounded."""
        return np.asarray(point_lps_mm) @ self._inverse[:3, :3].T + self._inverse[:3, 3]

    def extent_lps_mm(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest world corner (3,) of the box around all voxels, edges included."""
        faces = [(-0.5, size - 0.5) for size in self.shape]
        corners = self.to_world(np.stack(np.meshgrid(*faces, indexing="ij"), -1).reshape(-1, 3))
        return corners.min(0), corners.max(0)


def sphere_to_box(
    center_lps_mm: np.ndarray, diameter_mm: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Center (..., 3) and diameter (...) -> the cube around it: center and full edges (..., 3)."""
    center = np.asarray(center_lps_mm, dtype=np.float64)
    size = np.broadcast_to(np.asarray(diameter_mm, dtype=np.float64)[..., None], center.shape)
    return center, size.copy()


def box_to_sphere(center_lps_mm: np.ndarray, size_mm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Center and full edges (..., 3) -> center (..., 3) and diameter (...), the mean edge."""
    size = np.asarray(size_mm, dtype=np.float64)
    return np.asarray(center_lps_mm, dtype=np.float64), size.mean(-1)
