"""Chest CT as it lies on disk: an HU array with its grid, from NIfTI, MetaImage, NRRD or DICOM."""

from __future__ import annotations

import logging
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import SimpleITK as sitk
from pydicom.errors import InvalidDicomError

from deepem.errors import InputError
from deepem.geometry import RAS_TO_LPS, Grid

logger = logging.getLogger(__name__)

MAX_SPACING_MM = 8.0
"""Thicker slices leave most nodules in one slice or none."""

_AIR_HU = -200
"""Some voxel of every chest CT lies below: lung, or the air around the patient."""

_NIFTI_ERRORS = (
    OSError, EOFError, ValueError, zlib.error, nib.filebasedimages.ImageFileError
)  # fmt: skip

_SUFFIXES = (".nii.gz", ".nii", ".mha", ".mhd", ".nrrd", ".nhdr")


@dataclass(frozen=True, eq=False)
class Volume:
    """One CT series: ``hu`` (I, J, K), int16 or float32 Hounsfield units, on its own grid."""

    hu: np.ndarray
    grid: Grid
    series_uid: str


@dataclass(frozen=True)
class Study:
    """A series that lies on disk, not yet read. ``path`` is a file or a DICOM folder."""

    series_uid: str
    path: Path
    patient_id: str

    @property
    def size_bytes(self) -> int:
        """Of its file, or of all files in its folder."""
        files = self.path.iterdir() if self.path.is_dir() else [self.path]
        return sum(file.stat().st_size for file in files)


def is_image_file(path: Path) -> bool:
    """Whether the name is that of a volume file that `read_volume` reads."""
    return path.name.lower().endswith(_SUFFIXES)


def series_name(path: Path) -> str:
    """File name without its image suffix: the series UID of everything that is not DICOM."""
    lower = path.name.lower()
    suffix = next((suffix for suffix in _SUFFIXES if lower.endswith(suffix)), "")
    return path.name[: len(path.name) - len(suffix)]


def find_studies(path: Path, on_bad: Callable[[InputError], None] | None = None) -> list[Study]:
    """Every series at ``path``: an image file, a DICOM folder, or a folder of both, sorted by name.

    Sub-folders are searched as DICOM; labels and hidden folders are not images. A folder with
    several DICOM series gives one study for each. What looks like an image and is none goes to
    ``on_bad`` and the search goes on; without ``on_bad`` the first such error is raised.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(path, "image", "an existing file or folder", "nothing there")
    if path.is_file():
        return [Study(series_name(path), path, series_name(path))]
    studies = [
        Study(series_name(file), file, series_name(file))
        for file in sorted(path.iterdir())
        if file.is_file() and is_image_file(file)
    ]
    folders = [path, *sorted(d for d in path.iterdir() if d.is_dir() and _may_hold_images(d))]
    for folder in folders:
        content = _content(folder)
        bad = list(content.broken.values())
        # A plain folder of image files is not a DICOM folder without a CT.
        if not (content.series or bad) and (content.others or folder is not path):
            bad.append(content.none(folder))
        for error in bad:
            if on_bad is None:
                raise error
            on_bad(error)
        studies += [
            Study(uid, folder, slices[0].patient_id)
            for uid, slices in sorted(content.series.items())
        ]
    return studies


def _may_hold_images(folder: Path) -> bool:
    return not folder.name.startswith(".") and folder.name not in ("labels", "lobes", "reports")


def read_volume(path: Path | str, series_uid: str | None = None) -> Volume:
    """Read one scan: a NIfTI, MetaImage or NRRD file, or a folder of DICOM files.

    series_uid: which series of a DICOM folder; needed only when there are several. For other
    files it names the series instead of the file name.
    Raises InputError for everything that is no 3D CT in HU: missing, corrupt, empty, 2D or 4D,
    NaN, not in HU, coarser than 8 mm, several series, missing slices.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(path, "image", "an existing file or folder", "nothing there")
    if path.is_dir():
        volume = _read_dicom(path, series_uid)
    elif not is_image_file(path):
        raise InputError(path, "image", f"a DICOM folder or one of {_SUFFIXES}", path.name)
    else:
        hu, affine = read_image(path)
        volume = _checked(path, hu, affine, series_uid or series_name(path))
    return volume


def dicom_files(folder: Path | str, series_uid: str | None = None) -> tuple[list[Path], Grid]:
    """The files of a DICOM series, in the order of the slices k of the grid, which comes with them.

    series_uid and errors: as for `read_volume`, which reads the pixels too.
    """
    folder = Path(folder)
    slices, affine = _stacked(folder, _chosen(folder, series_uid)[1])
    rows, columns = slices[0].shape
    return [item.path for item in slices], Grid(affine, (columns, rows, len(slices)))


def grid_of_headers(where: str, headers: Sequence[pydicom.Dataset]) -> Grid:
    """Grid of one series by the headers of its images, wherever they come from.

    where: names the series in errors, which are those of `read_volume`.
    """
    if not headers:
        raise InputError(where, "DICOM series", "at least one image", "none")
    slices = [_slice(header, Path(str(header.get("SOPInstanceUID")))) for header in headers]
    slices, affine = _stacked(Path(where), slices)
    rows, columns = slices[0].shape
    return Grid(affine, (columns, rows, len(slices)))


def read_grid(path: Path | str, series_uid: str | None = None) -> Grid:
    """Grid of what `read_volume` reads, from the headers alone; InputError where there is none."""
    path = Path(path)
    if path.is_dir():
        return dicom_files(path, series_uid)[1]
    if path.is_file() and is_image_file(path):
        nifti = path.name.lower().endswith((".nii", ".nii.gz"))
        shape, affine = _nifti_header(path) if nifti else _itk_header(path)
    else:
        raise InputError(path, "image", f"a DICOM folder or one of {_SUFFIXES}", "none")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    try:
        return Grid(affine, shape)
    except ValueError as error:
        raise InputError(path, "geometry", "a 3D volume with an invertible affine", error) from None


def read_image(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Voxels (I, J, K, ...) of an image file of any kind, and the (4, 4) affine index -> LPS mm.

    Nothing is said about what the voxels mean; more axes than three come last. InputError for a
    file that cannot be read.
    """
    nifti = path.name.lower().endswith((".nii", ".nii.gz"))
    return _read_nifti(path) if nifti else _read_itk(path)


def resample(
    volume: Volume, lowest_lps_mm: np.ndarray, highest_lps_mm: np.ndarray, spacing_mm: float
) -> tuple[np.ndarray, Grid]:
    """Linear resampling onto the patient's axes: (I, J, K) float32 HU and its grid.

    The result fills the world box from corner to corner; outside the volume lies air (-1000 HU).
    """
    extent_mm = np.asarray(highest_lps_mm) - lowest_lps_mm
    shape = np.maximum(np.rint(extent_mm / spacing_mm), 1).astype(int)
    grid = Grid.axis_aligned(lowest_lps_mm + spacing_mm / 2, spacing_mm, tuple(shape))
    image = sitk.GetImageFromArray(volume.hu.transpose(2, 1, 0))  # index space: spacing 1, origin 0
    to_index = np.linalg.inv(volume.grid.affine_lps_mm)
    transform = sitk.AffineTransform(
        to_index[:3, :3].ravel().tolist(), to_index[:3, 3].tolist(), [0.0, 0.0, 0.0]
    )
    resampler = sitk.ResampleImageFilter()
    resampler.SetSize([int(size) for size in shape])
    resampler.SetOutputOrigin(grid.affine_lps_mm[:3, 3].tolist())
    resampler.SetOutputSpacing([spacing_mm] * 3)
    resampler.SetTransform(transform)
    resampler.SetInterpolator(sitk.sitkLinear)
    resampler.SetDefaultPixelValue(-1000.0)
    resampler.SetOutputPixelType(sitk.sitkFloat32)
    resampled = resampler.Execute(image)
    return sitk.GetArrayFromImage(resampled).transpose(2, 1, 0), grid


def _checked(where: Path, hu: np.ndarray, affine_lps_mm: np.ndarray, series_uid: str) -> Volume:
    """The volume, if it can be a chest CT."""
    while hu.ndim > 3 and hu.shape[-1] == 1:
        hu = hu[..., 0]
    if hu.ndim != 3:
        raise InputError(where, "dimensions", "3 (one CT volume)", f"shape {hu.shape}")
    if min(hu.shape) < 2:
        raise InputError(where, "shape", "at least 2 voxels along every axis", f"{hu.shape}")
    if hu.dtype.kind not in "iuf":
        raise InputError(where, "voxel type", "one number per voxel", hu.dtype)
    if hu.dtype.kind == "f":
        bad = int(hu.size - np.count_nonzero(np.isfinite(hu)))
        if bad:
            raise InputError(where, "voxels", "finite HU", f"{bad} NaN or infinite voxels")
    lowest, highest = float(hu.min()), float(hu.max())
    if lowest == highest:
        raise InputError(where, "voxels", "an image", f"the same value {lowest:g} everywhere")
    if lowest > _AIR_HU:
        raise InputError(
            where, "voxels", f"HU with air below {_AIR_HU}", f"values {lowest:g} to {highest:g}"
        )
    try:
        grid = Grid(affine_lps_mm, hu.shape)
    except ValueError as error:
        raise InputError(where, "geometry", "a finite, invertible affine", error) from error
    coarsest = grid.spacing_mm.max()
    if coarsest > MAX_SPACING_MM + 1e-3:
        raise InputError(
            where, "voxel spacing", f"at most {MAX_SPACING_MM:g} mm", f"{coarsest:.3g} mm"
        )
    fits_int16 = hu.dtype.kind in "iu" and lowest >= -32768 and highest <= 32767
    return Volume(hu.astype(np.int16 if fits_int16 else np.float32, copy=False), grid, series_uid)


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        image: Any = nib.load(path)
        return np.asanyarray(image.dataobj), RAS_TO_LPS @ image.affine
    except _NIFTI_ERRORS as error:
        raise InputError(path, "file", "a readable NIfTI image", _first_line(error)) from error


def _nifti_header(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    try:
        image: Any = nib.load(path)
        return image.shape, RAS_TO_LPS @ image.affine
    except _NIFTI_ERRORS as error:
        raise InputError(path, "file", "a readable NIfTI image", _first_line(error)) from error


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:
        raise InputError(path, "file", "a readable image", _itk_reason(error)) from error
    if image.GetDimension() != 3:
        raise InputError(path, "dimensions", "3 (one volume)", f"shape {image.GetSize()}")
    return np.moveaxis(sitk.GetArrayFromImage(image), (0, 2), (2, 0)), _itk_affine(image)


def _itk_header(path: Path) -> tuple[tuple[int, ...], np.ndarray]:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise InputError(path, "file", "a readable image", _itk_reason(error)) from error
    if reader.GetDimension() != 3:
        raise InputError(path, "dimensions", "3 (one volume)", f"shape {reader.GetSize()}")
    return reader.GetSize(), _itk_affine(reader)


def _itk_affine(image: sitk.Image | sitk.ImageFileReader) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return affine


@dataclass(frozen=True)
class _Slice:
    """What the header of one DICOM file says about its place in the patient."""

    path: Path
    patient_id: str
    position_lps_mm: tuple[float, ...]
    orientation: tuple[float, ...]
    spacing_mm: tuple[float, ...]
    shape: tuple[int, int]  # rows, columns


_HEADER_TAGS = [
    "SeriesInstanceUID", "PatientID", "Modality", "ImagePositionPatient", "NumberOfFrames",
    "ImageOrientationPatient", "PixelSpacing", "Rows", "Columns",
]  # fmt: skip


@dataclass(frozen=True)
class _Content:
    """DICOM in a folder: slices of the CT series by UID, what is wrong with others, the rest.

    broken: by series UID, or by the name of a file that does not even tell that.
    others: series that are no CT, with their modality.
    """

    series: dict[str, list[_Slice]]
    broken: dict[str, InputError]
    others: list[str]
    files: int

    def none(self, folder: Path) -> InputError:
        """The error that there is no CT at all."""
        got = f"other modalities: {', '.join(self.others)}" if self.others else "none"
        return InputError(folder, "DICOM series", f"a CT among its {self.files} files", got)


def _content(folder: Path) -> _Content:
    """Look at all headers; one broken file breaks its series, not the others beside it."""
    series: dict[str, list[_Slice]] = defaultdict(list)
    broken: dict[str, InputError] = {}
    others: set[str] = set()
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    for file in files:
        uid = file.name
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_HEADER_TAGS)
            if file.name == "DICOMDIR":
                continue
            if not header.get("SeriesInstanceUID"):
                raise InputError(file, "SeriesInstanceUID", "a UID", "none")
            uid = str(header.SeriesInstanceUID)
            if header.get("Modality") != "CT":
                others.add(f"{uid} ({header.get('Modality')})")
                continue
            series[uid].append(_slice(header, file))
        except InvalidDicomError:
            continue
        except InputError as error:
            broken.setdefault(uid, error)
        except Exception as error:  # whatever rubbish does to the parser
            broken.setdefault(uid, InputError(file, "file", "readable DICOM", _first_line(error)))
    for other in sorted(others):
        logger.info("%s: skipped series %s: not a CT", folder, other)
    whole = {uid: slices for uid, slices in series.items() if uid not in broken}
    return _Content(whole, broken, sorted(others), len(files))


def _slice(header: pydicom.Dataset, path: Path) -> _Slice:
    try:
        if int(header.get("NumberOfFrames") or 1) > 1:
            raise InputError(path, "NumberOfFrames", "1 (one slice a file)", "a multi-frame CT")
        return _Slice(
            path,
            str(header.get("PatientID") or header.SeriesInstanceUID),
            tuple(map(float, header.ImagePositionPatient)),
            tuple(map(float, header.ImageOrientationPatient)),
            tuple(map(float, header.PixelSpacing)),
            (int(header.Rows), int(header.Columns)),
        )
    except (AttributeError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        wanted = "position, orientation and spacing of a CT slice"
        raise InputError(path, "DICOM header", wanted, _first_line(error)) from error


def _chosen(folder: Path, series_uid: str | None) -> tuple[str, list[_Slice]]:
    """The series ``series_uid`` of a folder, or its only one."""
    content = _content(folder)
    series, broken = content.series, content.broken
    if series_uid in broken or (broken and not series):
        raise broken[series_uid] if series_uid in broken else next(iter(broken.values()))
    if not series:
        raise content.none(folder)
    if series_uid is None and len(series) > 1:
        listing = "; ".join(
            f"{uid} ({len(slices)} files)" for uid, slices in sorted(series.items())
        )
        raise InputError(folder, "DICOM series", "one, or the UID of one of them", listing)
    uid = series_uid or next(iter(series))
    if uid not in series:
        raise InputError(folder, "series UID", f"one of {sorted(series)}", uid)
    return uid, series[uid]


def _read_dicom(folder: Path, series_uid: str | None) -> Volume:
    uid, files = _chosen(folder, series_uid)
    slices, affine = _stacked(folder, files)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames([str(item.path) for item in slices])
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise InputError(folder, "DICOM pixels", "readable slices", _itk_reason(error)) from error
    return _checked(folder, sitk.GetArrayFromImage(image).transpose(2, 1, 0), affine, uid)


def _stacked(folder: Path, slices: list[_Slice]) -> tuple[list[_Slice], np.ndarray]:
    """Slices in the order of their position, and the affine of the stack (sheared when tilted)."""
    first = slices[0]
    for item in slices[1:]:
        for field in ("orientation", "spacing_mm", "shape"):
            expected, got = getattr(first, field), getattr(item, field)
            if not np.allclose(got, expected, atol=1e-3):
                raise InputError(item.path, field, f"{expected} as in {first.path.name}", got)
    if len(slices) < 2:
        raise InputError(folder, "slices", "at least 2", len(slices))
    row, column = np.reshape(first.orientation, (2, 3))
    along = np.array([item.position_lps_mm for item in slices]) @ np.cross(row, column)
    order = np.argsort(along, kind="stable")
    slices, along = [slices[at] for at in order], along[order]
    gaps_mm = np.diff(along)
    repeated = np.count_nonzero(gaps_mm < 0.01)
    if repeated:
        got = f"{repeated} of {len(slices)} at that of another (4D, or two scans)"
        raise InputError(folder, "slice positions", "one image at each", got)
    step_mm = float(np.median(gaps_mm))
    odd = np.flatnonzero(np.abs(gaps_mm - step_mm) > max(0.1 * step_mm, 0.05))
    if odd.size:
        at = int(odd[0])
        raise InputError(folder, "slice positions", f"a slice every {step_mm:.3f} mm",
                         f"{gaps_mm[at]:.3f} mm after {slices[at].path.name}, and {odd.size - 1} "
                         "more such gaps (missing slices)")  # fmt: skip
    start, end = (np.array(slices[at].position_lps_mm) for at in (0, -1))
    affine = np.eye(4)
    affine[:3, 0] = row * first.spacing_mm[1]  # PixelSpacing is (between rows, between columns)
    affine[:3, 1] = column * first.spacing_mm[0]
    affine[:3, 2] = (end - start) / (len(slices) - 1)
    affine[:3, 3] = start
    return slices, affine


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _itk_reason(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else "unreadable"
