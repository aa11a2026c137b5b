"""A scan as the network sees it, in training and serving: lungs, 1 mm isotropic, windowed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from deepem.errors import InputError
from deepem.files import atomic_path
from deepem.geometry import Grid
from deepem.lungs import Lungs, find_lungs
from deepem.volume import Study, Volume, read_volume, resample

SPACING_MM = 1.0
HU_WINDOW = (-1200.0, 600.0)
"""Clipped and scaled to 0..255 (Zhu et al. 2018, the authors' code)."""

_FORMAT = 2
"""Of the cache; a change of what is stored makes old entries unknown."""

_MARGIN_MM = 12.0
"""Kept around the lungs, so that a nodule at the pleura is seen with its surroundings."""


@dataclass(frozen=True, eq=False)
class Scan:
    """A prepared scan.

    image: (I, J, K) uint8, the HU window as 0..255; i, j, k run along LPS x, y, z at 1 mm.
    grid: where it lies in the patient. lungs: found on the whole volume. fingerprint: hash of the
    image, so that nobody has to read all of it to know it again.
    """

    series_uid: str
    image: np.ndarray
    grid: Grid
    lungs: Lungs
    fingerprint: str

    def mean_hu(self, center_lps_mm: np.ndarray, diameter_mm: np.ndarray) -> np.ndarray:
        """(P, 3), (P,) -> (P,) mean HU in the inner half of spheres, clipped to `HU_WINDOW`."""
        steps = np.stack(np.meshgrid(*[np.linspace(-0.25, 0.25, 5)] * 3, indexing="ij"), -1)
        steps = steps.reshape(-1, 3)
        steps = steps[np.linalg.norm(steps, axis=1) <= 0.25]
        center_index = self.grid.to_index(np.reshape(center_lps_mm, (-1, 3)))
        at = center_index[:, None] + steps * np.reshape(diameter_mm, (-1, 1, 1)) / SPACING_MM
        values = ndimage.map_coordinates(self.image, at.T, np.float32, order=1, mode="nearest")
        low, high = HU_WINDOW
        return low + values.mean(0) * (high - low) / 255


def prepare(volume: Volume) -> Scan:
    """Crop to the lungs, resample to 1 mm along the patient's axes, window to 8 bits.

    Any invertible grid will do: oblique, flipped, tilted. World coordinates stay what they are,
    so what is found in ``Scan.grid`` needs no way back.
    """
    lungs = find_lungs(volume)
    lowest, highest = volume.grid.extent_lps_mm()
    lowest = np.maximum(lowest, lungs.lowest_lps_mm - _MARGIN_MM)
    highest = np.minimum(highest, lungs.highest_lps_mm + _MARGIN_MM)
    image, grid = resample(volume, lowest, highest, SPACING_MM)
    low, high = HU_WINDOW
    image -= low
    image *= 255.0 / (high - low)
    np.clip(image, 0, 255, out=image)
    np.rint(image, out=image)
    image = image.astype(np.uint8)
    # Not tobytes(): on these strides it takes half a second in which no other thread runs.
    fingerprint = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16).hexdigest()
    return Scan(volume.series_uid, image, grid, lungs, fingerprint)


def mirrored(scan: Scan) -> Scan:
    """The same scan with its voxels in the reverse order along x, right becoming left.

    The grid runs the other way too, so what is found still has the patient's own coordinates.
    """
    reverse = np.diag([-1.0, 1.0, 1.0, 1.0])
    reverse[0, 3] = scan.image.shape[0] - 1
    grid = Grid(scan.grid.affine_lps_mm @ reverse, scan.grid.shape)
    return replace(scan, image=scan.image[::-1], grid=grid)


class ScanCache:
    """Prepared scans on disk, so that no scan is read twice; images are memory-mapped.

    A scan is prepared again when its file changes (name, size, time) or this module's constants do.
    """

    def __init__(self, folder: Path):
        self._folder = folder

    def get(self, study: Study, *, keep: bool = True) -> Scan:
        """The prepared scan; InputError when the study cannot be read.

        keep: whether one that is not there yet is put there.
        """
        entry = self._folder / self.key(study)
        if not (entry / "meta.npz").exists():
            scan = prepare(read_volume(study.path, study.series_uid))
            if not keep:
                return scan
            self._store(entry, scan)
        image = np.load(entry / "image.npy", mmap_mode="r")
        with np.load(entry / "meta.npz") as meta:
            lungs = Lungs(
                meta["mask"],
                Grid(meta["lungs_affine"], meta["mask"].shape),
                meta["lowest"],
                meta["highest"],
                bool(meta["found"]),
            )
            grid = Grid(meta["affine"], image.shape)
            return Scan(study.series_uid, image, grid, lungs, str(meta["fingerprint"]))

    @staticmethod
    def _store(entry: Path, scan: Scan) -> None:
        with atomic_path(entry / "image.npy") as part:
            np.save(part, scan.image)
        with atomic_path(entry / "meta.npz") as part:  # last: it says that the entry is whole
            np.savez(
                part,
                affine=scan.grid.affine_lps_mm,
                mask=scan.lungs.mask,
                lungs_affine=scan.lungs.grid.affine_lps_mm,
                lowest=scan.lungs.lowest_lps_mm,
                highest=scan.lungs.highest_lps_mm,
                found=scan.lungs.found,
                fingerprint=scan.fingerprint,
            )

    @staticmethod
    def key(study: Study) -> str:
        """Hash of the study's files as they are now, unread; InputError when they are not there."""
        files = sorted(study.path.iterdir()) if study.path.is_dir() else [study.path]
        digest = hashlib.blake2b(digest_size=12)
        digest.update(repr((_FORMAT, study.series_uid, SPACING_MM, HU_WINDOW, _MARGIN_MM)).encode())
        for file in files:
            try:
                stat = file.stat()
            except OSError as error:
                raise InputError(file, "image", "a readable file", error) from error
            digest.update(repr((str(file.resolve()), stat.st_size, stat.st_mtime_ns)).encode())
        return digest.hexdigest()
