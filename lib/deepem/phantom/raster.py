"""Drawing on regular grids: interpolation, smooth noise, and capsules in local boxes.

A grid here is its three axes: ascending 1-D arrays of voxel-centre positions in mm (x, y, z).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Box = tuple[slice, slice, slice]
Axes = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Capsules:
    """Straight tapered tubes with round ends, in mm.

    start_mm, end_mm: (N, 3). radius_mm: (N, 2), at the start and at the end.
    """

    start_mm: np.ndarray
    end_mm: np.ndarray
    radius_mm: np.ndarray

    def __len__(self) -> int:
        return len(self.start_mm)

    def of(self, chosen: np.ndarray) -> Capsules:
        """Select by mask or indices."""
        return Capsules(self.start_mm[chosen], self.end_mm[chosen], self.radius_mm[chosen])

    @classmethod
    def along(cls, path_mm: np.ndarray, radius_mm: np.ndarray) -> Capsules:
        """Chain along a path (N, 3) with the radius (N,) at each point."""
        return cls(path_mm[:-1], path_mm[1:], np.stack([radius_mm[:-1], radius_mm[1:]], -1))

    @classmethod
    def join(cls, parts: list[Capsules]) -> Capsules:
        """All tubes of several."""
        return cls(
            np.concatenate([part.start_mm for part in parts]),
            np.concatenate([part.end_mm for part in parts]),
            np.concatenate([part.radius_mm for part in parts]),
        )

    @classmethod
    def none(cls) -> Capsules:
        """No tube at all."""
        return cls(np.empty((0, 3)), np.empty((0, 3)), np.empty((0, 2)))


def shape_of(axes: Axes) -> tuple[int, int, int]:
    """Voxels along x, y, z."""
    return len(axes[0]), len(axes[1]), len(axes[2])


def spacing_mm(axes: Axes) -> np.ndarray:
    """(3,) step of each axis."""
    return np.array([axis[1] - axis[0] for axis in axes])


def between(axes: Axes, lowest_mm: np.ndarray, highest_mm: np.ndarray) -> Box:
    """Slices of the voxels whose centres lie inside the box; empty ones where there are none."""
    return tuple(
        slice(*np.searchsorted(axis, (low, high)))
        for axis, low, high in zip(axes, lowest_mm, highest_mm, strict=True)
    )  # type: ignore[return-value]


def box_around(chosen: np.ndarray, coarse: Axes, axes: Axes) -> Box:
    """Box of ``axes`` that holds all chosen voxels of a coarse grid; empty when there are none."""
    found = [np.flatnonzero(chosen.any(tuple({0, 1, 2} - {dim}))) for dim in range(3)]
    if not len(found[0]):
        return slice(0), slice(0), slice(0)
    ends = [(axis[index[0]], axis[index[-1]]) for axis, index in zip(coarse, found, strict=True)]
    low, high = np.array(ends).T
    step = spacing_mm(coarse)
    return between(axes, low - step, high + step)


def sub_axes(axes: Axes, box: Box) -> Axes:
    """Axes of a box of the grid."""
    return axes[0][box[0]], axes[1][box[1]], axes[2][box[2]]


def points_of(axes: Axes) -> np.ndarray:
    """(I, J, K, 3) position of every voxel."""
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)


def resample(values: np.ndarray, source: Axes, target: Axes) -> np.ndarray:
    """Trilinear interpolation from one grid onto another, clamped at the faces; float32."""
    for dim in (2, 1, 0):  # the strided gather along z comes first, while the array is small
        position = np.interp(target[dim], source[dim], np.arange(len(source[dim])))
        low = np.minimum(position.astype(np.intp), len(source[dim]) - 2)
        weight = (position - low).astype(np.float32)
        weight = weight.reshape([-1 if d == dim else 1 for d in range(3)])
        below = np.take(values, low, axis=dim)
        above = np.take(values, low + 1, axis=dim)
        above -= below
        above *= weight
        above += below
        values = above
    return values


def sample(values: np.ndarray, axes: Axes, points_mm: np.ndarray) -> np.ndarray:
    """Trilinear interpolation at points (..., 3) -> (...), clamped at the faces."""
    result = np.zeros(points_mm.shape[:-1], np.float32)
    corner, weight = [], []
    for dim in range(3):
        position = np.interp(points_mm[..., dim], axes[dim], np.arange(len(axes[dim])))
        low = np.minimum(position.astype(np.intp), len(axes[dim]) - 2)
        corner.append(low)
        weight.append((position - low).astype(np.float32))
    for a, b, c in np.ndindex(2, 2, 2):
        share = np.abs(1 - a - weight[0]) * np.abs(1 - b - weight[1]) * np.abs(1 - c - weight[2])
        result += share * values[corner[0] + a, corner[1] + b, corner[2] + c]
    return result


def smooth_noise(rng: np.random.Generator, axes: Axes, length_mm: float) -> np.ndarray:
    """Random field of unit variance and correlation length ``length_mm``; float32.

    Cubic B-splines on a lattice of normal coefficients: three small matrix products.
    """
    bases = []
    for axis in axes:
        position = (axis - axis[0]) / length_mm + rng.uniform(1, 2)
        knots = np.arange(int(position[-1]) + 4)
        away = np.abs(position[:, None] - knots)
        basis = np.where(away < 1, 2 / 3 - away**2 + away**3 / 2, np.maximum(2 - away, 0) ** 3 / 6)
        # Each row scaled to unit norm: the variance is then 1 everywhere, not only at the knots.
        bases.append((basis / np.linalg.norm(basis, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([basis.shape[1] for basis in bases], dtype=np.float32)
    field = field @ bases[2].T
    field = np.matmul(bases[1], field)
    return np.tensordot(bases[0], field, axes=1)


def polyline_distance(axes: Axes, path_mm: np.ndarray) -> np.ndarray:
    """Distance of every voxel to the polyline ``path_mm`` (N, 3); float32."""
    nearest = np.full(shape_of(axes), np.inf, np.float32)
    for start, end in zip(path_mm[:-1], path_mm[1:], strict=True):
        np.minimum(nearest, _segment_squared(axes, start, end)[0], out=nearest)
    return np.sqrt(nearest)


def _segment_squared(
    axes: Axes, start: np.ndarray, end: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distance to the segment, and the position along it in 0..1, of every voxel."""
    along = end - start
    norm = float(along @ along) or 1.0
    x = (axes[0] - start[0]).astype(np.float32)[:, None, None]
    y = (axes[1] - start[1]).astype(np.float32)[:, None]
    z = (axes[2] - start[2]).astype(np.float32)
    u, v, w = (np.float32(value / norm) for value in along)
    t = x * u + y * v + z * w
    np.clip(t, 0, 1, out=t)
    a, b, c = (np.float32(value) for value in along)
    squared = (x - t * a) ** 2
    squared += (y - t * b) ** 2
    squared += (z - t * c) ** 2
    return squared, t


def capsule_depth(axes: Axes, capsules: Capsules, margin_mm: float) -> np.ndarray:
    """Depth of every voxel below the surface of the nearest capsule, at least ``-margin_mm``.

    Each capsule is measured in its own small box only. float32.
    """
    depth = np.full(shape_of(axes), -margin_mm, np.float32)
    start, end, radius = capsules.start_mm, capsules.end_mm, capsules.radius_mm
    reach = radius.max(1, initial=0)[:, None] + margin_mm
    lowest, highest = np.minimum(start, end) - reach, np.maximum(start, end) + reach
    first = np.stack([np.searchsorted(axes[d], lowest[:, d]) for d in range(3)], -1)
    last = np.stack([np.searchsorted(axes[d], highest[:, d]) for d in range(3)], -1)
    for n in np.flatnonzero((last > first).all(-1)):
        (i, j, k), (i_end, j_end, k_end) = first[n], last[n]
        box = slice(i, i_end), slice(j, j_end), slice(k, k_end)
        squared, t = _segment_squared(sub_axes(axes, box), start[n], end[n])
        t *= np.float32(radius[n, 1] - radius[n, 0])
        t += np.float32(radius[n, 0])
        t -= np.sqrt(squared, out=squared)
        view = depth[box]
        np.maximum(view, t, out=view)
    return depth


def occupancy(depth_mm: np.ndarray, edge_mm: float) -> np.ndarray:
    """Share of a voxel that is inside: a linear ramp of width ``edge_mm`` across depth 0."""
    share = depth_mm * np.float32(1 / edge_mm)
    share += np.float32(0.5)
    return np.clip(share, 0, 1, out=share)


def blend(hu: np.ndarray, share: np.ndarray, value: np.ndarray | float) -> None:
    """Replace ``share`` of every voxel by ``value``, in place."""
    hu += share * (value - hu)
