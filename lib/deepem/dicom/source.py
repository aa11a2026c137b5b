"""The CT series that a DICOM object speaks of, and how such an object is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from deepem.errors import InputError
from deepem.files import atomic_path
from deepem.geometry import Grid
from deepem.volume import dicom_files

_REQUIRED = ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID")
_MAY_BE_EMPTY = (
    "PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID",
    "StudyDate", "StudyTime", "ReferringPhysicianName",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """A CT series without its pixels: the header of slice k of ``grid`` is ``headers[k]``."""

    headers: tuple[Dataset, ...]
    grid: Grid

    @property
    def series_uid(self) -> str:
        """SeriesInstanceUID."""
        return str(self.headers[0].SeriesInstanceUID)


def read_source(folder: Path | str, series_uid: str | None = None) -> Source:
    """A series of a DICOM folder, in the order of its slices whatever their InstanceNumbers are.

    series_uid: needed only when the folder has several. InputError for what `read_volume` refuses
    too, and when something is missing that other objects must refer to.
    """
    files, grid = dicom_files(folder, series_uid)
    headers = []
    for file in files:
        header = pydicom.dcmread(file, stop_before_pixels=True)
        for tag in _REQUIRED:
            if not header.get(tag):
                raise InputError(file, tag, "a UID, which a SEG or SR must name", "none")
        for tag in _MAY_BE_EMPTY:
            if tag not in header:
                setattr(header, tag, "")
        if not header.get("SliceThickness"):
            header.SliceThickness = f"{grid.spacing_mm[2]:.6g}"
        headers.append(header)
    return Source(tuple(headers), grid)


def write_dicom(dataset: Dataset, path: Path | str) -> None:
    """Write a whole DICOM file or none."""
    with atomic_path(path) as aside:
        dataset.save_as(aside, write_like_original=False)
