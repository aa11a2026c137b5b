"""From a slice number to mm in the patient: conventions, DICOM headers, the direction of a corpus.

A number means nothing without its convention: records count from the head, volume files usually
have their first slice at the feet, and a wrong guess mirrors every label of a corpus. So numbers
are resolved by DICOM headers where there are any, else by what was declared, else by the test of
`direction_evidence` over all labels, which may refuse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from deepem.errors import InputError
from deepem.geometry import Grid
from deepem.nodule import Lobe, SliceConvention, WeakLabel
from deepem.volume import Study, grid_of_headers, read_grid

_SAME_PLACE_MM = 0.01

MEDIAN_HEIGHT = {
    Lobe.RUL: 1 - 0.257,
    Lobe.RML: 1 - 0.505,
    Lobe.RLL: 1 - 0.546,
    Lobe.LUL: 1 - 0.248,
    Lobe.LINGULA: 1 - 0.534,
    Lobe.LLL: 1 - 0.600,
}
"""Relative height of a nodule in the scan, 0 feet to 1 head: medians of 18,349 published weak
labels of the NLST, which count from the head."""

HEIGHT_SPREAD = 0.15
"""Assumed standard deviation around the median: lobes are about 0.4 of a scan high."""

OUTLIERS = 0.1
"""Assumed share of labels that lie anywhere, for wrong lobes and numbers: no single label can
then speak louder than about 3 nats."""

ENOUGH_NATS = math.log(1000)
"""Odds of 1000 to 1 before a whole corpus is believed to be counted one way; more than any two
labels can give."""

MAX_AGAINST = 0.25
"""A corpus in one direction has about one label in ten that clearly (1 nat) speaks against it.
More than this share means mixed directions or wrong lobes."""


@dataclass(frozen=True)
class DicomImage:
    """One DICOM image of a study: its names, and the height of its centre in the patient."""

    series_uid: str
    sop_instance_uid: str
    series_number: int | None
    instance_number: int | None
    frame_of_reference: str
    axial: bool
    z_lps_mm: float


@dataclass(frozen=True)
class ScanSlices:
    """Where the slices of one scan lie. ``images`` is empty for everything that is not DICOM.

    A slice is a plane across that array axis which runs nearest to the patient's z; its z is that
    of the plane at the centre of the volume, whatever way the axis runs.
    """

    where: str
    series_uid: str
    grid: Grid
    images: tuple[DicomImage, ...] = ()

    @property
    def _axis(self) -> int:
        return int(np.abs(self.grid.affine_lps_mm[2, :3] / self.grid.spacing_mm).argmax())

    @property
    def count(self) -> int:
        """How many slices there are."""
        return self.grid.shape[self._axis]

    def z_lps_mm(self, from_feet: float) -> float:
        """Height of the slice that is ``from_feet`` slices above the lowest (0)."""
        index = (np.array(self.grid.shape) - 1) / 2
        upwards = self.grid.affine_lps_mm[2, self._axis] > 0
        index[self._axis] = from_feet if upwards else self.count - 1 - from_feet
        return float(self.grid.to_world(index)[2])

    def height(self, z_lps_mm: float) -> float:
        """Relative height in the scan: 0 at the lower face of the lowest slice, 1 at the head."""
        lowest, highest = self.z_lps_mm(-0.5), self.z_lps_mm(self.count - 0.5)
        return (z_lps_mm - lowest) / (highest - lowest)


def read_slices(study: Study) -> ScanSlices:
    """Geometry of a scan from its headers; InputError when it cannot be read."""
    folder = study.path.is_dir()
    grid = read_grid(study.path, study.series_uid if folder else None)
    images = _read_images(study) if folder else ()
    return ScanSlices(str(study.path), study.series_uid, grid, images)


def slices_of_headers(
    where: str, series_uid: str, headers: Sequence[pydicom.Dataset]
) -> ScanSlices:
    """The same from headers that are no files, as a PACS tells them (DICOM JSON metadata).

    headers: of all images of the series, and of others of the study that a record may name.
    """
    grid = grid_of_headers(
        where, [header for header in headers if str(header.SeriesInstanceUID) == series_uid]
    )
    images = tuple(_image(header) for header in headers if _is_image(header))
    return ScanSlices(where, series_uid, grid, images)


def z_lps_mm(label: WeakLabel, scan: ScanSlices) -> float | None:
    """Height of the label's slice in the patient; None when the label has no slice.

    A number of undeclared convention is an InstanceNumber where there are DICOM headers.
    InputError, with the label's source, for a number that is not in the scan and for a convention
    that this scan cannot answer.
    """
    if label.sop_instance_uid is not None:
        return _named_z_lps_mm(label, scan)
    number, convention = label.slice_number, label.slice_convention
    if number is None or convention is None:
        return label.z_lps_mm
    if convention is SliceConvention.UNDECLARED and scan.images:
        convention = SliceConvention.DICOM_INSTANCE
    if convention is SliceConvention.DICOM_INSTANCE:
        return _instance_z_lps_mm(label, number, scan)
    if convention is SliceConvention.UNDECLARED:
        declared = "dicom_instance, one_at_head or zero_at_feet"
        raise InputError(label.source, "slice_convention", declared, "none")
    from_feet = _from_feet(number, convention, scan.count)
    if not 0 <= from_feet < scan.count:
        one = int(convention is SliceConvention.ONE_AT_HEAD)
        numbers = f"{one} to {scan.count - 1 + one} ({convention.value}, {scan.where})"
        raise InputError(label.source, "slice_number", numbers, number)
    return scan.z_lps_mm(from_feet)


def in_patient_space(
    labels: Iterable[WeakLabel], scans: Mapping[str, ScanSlices]
) -> tuple[list[WeakLabel], list[InputError]]:
    """Labels with ``z_lps_mm`` in place of their slice number, and those that cannot be placed.

    scans: by series UID; a label of any other series is refused, one without a slice stays as it
    is. Numbers of undeclared convention get the one that `direction_evidence` finds over all of
    them, or are all refused with its reason.
    """
    labels = list(labels)
    undecided: InputError | None = None
    convention = SliceConvention.UNDECLARED
    try:
        if any(_needs_direction(label, scans) for label in labels):
            convention = direction_evidence(labels, scans).convention()
    except InputError as error:
        undecided = error
    placed, rejected = [], []
    for label in labels:
        try:
            if label.series_uid not in scans:
                raise InputError(label.source, "seriesuid", "a scan that is there",
                                 label.series_uid)  # fmt: skip
            if _needs_direction(label, scans):
                if undecided:
                    raise InputError(label.source, undecided.field, undecided.expected,
                                     undecided.got)  # fmt: skip
                label = replace(label, slice_convention=convention)
            if label.to_be_placed:
                z = z_lps_mm(label, scans[label.series_uid])
                label = replace(label, slice_number=None, slice_convention=None,
                                series_number=None, sop_instance_uid=None, z_lps_mm=z)  # fmt: skip
            placed.append(label)
        except InputError as error:
            rejected.append(error)
    return placed, rejected


@dataclass(frozen=True)
class DirectionEvidence:
    """What a corpus says about the end from which its undeclared slice numbers count.

    labels: how many were used (with lobe, and a number that is possible from both ends).
    head_nats, feet_nats: log likelihood of all of them, counted from the head and from the feet.
    for_head, for_feet: labels that speak clearly, by more than one nat, for either.
    """

    labels: int
    head_nats: float
    feet_nats: float
    for_head: int
    for_feet: int

    def __str__(self) -> str:
        return (
            f"{self.labels} labels: {self.head_nats:.1f} nats from the head, "
            f"{self.feet_nats:.1f} nats from the feet; clearly for head {self.for_head}, "
            f"for feet {self.for_feet}"
        )

    def convention(self) -> SliceConvention:
        """The direction that the evidence shows; InputError when it is not clear enough."""
        head = self.head_nats > self.feet_nats
        against = self.for_feet if head else self.for_head
        clear = self.for_head + self.for_feet
        if abs(self.head_nats - self.feet_nats) < ENOUGH_NATS or against > MAX_AGAINST * clear:
            expected = (
                f"declared, or evidence of {ENOUGH_NATS:.1f} nats for one direction with at most "
                f"{MAX_AGAINST:.0%} of the clear labels against it"
            )
            raise InputError("undeclared slice numbers", "slice_convention", expected, self)
        return SliceConvention.ONE_AT_HEAD if head else SliceConvention.ZERO_AT_FEET


def direction_evidence(
    labels: Iterable[WeakLabel], scans: Mapping[str, ScanSlices]
) -> DirectionEvidence:
    """Test both directions for the undeclared slice numbers of scans without DICOM headers.

    Every label has a relative height in the scan under each direction, and its lobe says how
    likely that is: a normal distribution around `MEDIAN_HEIGHT` with `HEIGHT_SPREAD`, mixed with
    a uniform one (`OUTLIERS`). Labels are taken as independent, and never turned one by one.
    """
    log_likelihood = [
        [
            _log_density(label.lobe, (_from_feet(number, convention, count) + 0.5) / count)
            for convention in (SliceConvention.ONE_AT_HEAD, SliceConvention.ZERO_AT_FEET)
        ]
        for label in labels
        if _needs_direction(label, scans)
        and label.lobe is not None
        and (number := label.slice_number) is not None
        and 1 <= number < (count := scans[label.series_uid].count)
    ]
    nats = np.reshape(log_likelihood, (-1, 2))
    difference = nats[:, 0] - nats[:, 1]
    return DirectionEvidence(
        len(nats),
        float(nats[:, 0].sum()),
        float(nats[:, 1].sum()),
        int((difference > 1).sum()),
        int((difference < -1).sum()),
    )


def _needs_direction(label: WeakLabel, scans: Mapping[str, ScanSlices]) -> bool:
    if label.slice_convention is not SliceConvention.UNDECLARED or label.series_uid not in scans:
        return False
    return not scans[label.series_uid].images


def _from_feet(number: int, convention: SliceConvention, count: int) -> int:
    return count - number if convention is SliceConvention.ONE_AT_HEAD else number


def _log_density(lobe: Lobe, height: float) -> float:
    z = (height - MEDIAN_HEIGHT[lobe]) / HEIGHT_SPREAD
    normal = math.exp(-0.5 * z * z) / (HEIGHT_SPREAD * math.sqrt(2 * math.pi))
    return math.log((1 - OUTLIERS) * normal + OUTLIERS)


def _instance_z_lps_mm(label: WeakLabel, number: int, scan: ScanSlices) -> float:
    if not scan.images:
        raise InputError(label.source, "slice_convention", "one_at_head or zero_at_feet, or the "
                         f"DICOM headers of the scan (InstanceNumber is not in {scan.where})",
                         "dicom_instance")  # fmt: skip
    own = [image for image in scan.images if image.series_uid == scan.series_uid]
    series = own
    if label.series_number is not None:
        frames = {image.frame_of_reference for image in own}
        series = [
            image
            for image in scan.images
            if image.series_number == label.series_number and image.frame_of_reference in frames
        ]
        if not series:
            there = sorted({n for image in scan.images if (n := image.series_number) is not None})
            raise InputError(label.source, "series_number", f"one of {there} ({scan.where})",
                             label.series_number)  # fmt: skip
    found = [image for image in series if image.instance_number == number]
    if not found:
        numbers = [n for image in series if (n := image.instance_number) is not None]
        span = f"{min(numbers)} to {max(numbers)}" if numbers else "which has none"
        expected = f"an InstanceNumber of the series, {span} ({scan.where})"
        raise InputError(label.source, "slice_number", expected, number)
    if not all(image.axial for image in found):
        raise InputError(label.source, "series_number", "a series of axial images",
                         f"image {number} of a coronal or sagittal one")  # fmt: skip
    heights = [image.z_lps_mm for image in found]
    if max(heights) - min(heights) > _SAME_PLACE_MM:
        raise InputError(label.source, "slice_number", "an InstanceNumber that is there once",
                         f"{number}, at z {', '.join(f'{z:g}' for z in heights)}")  # fmt: skip
    return heights[0]


def _named_z_lps_mm(label: WeakLabel, scan: ScanSlices) -> float:
    """Of the image that the label names by its UID, in the scan or beside it in the same frame."""
    if not scan.images:
        raise InputError(label.source, "sop_instance_uid",
                         f"nothing for a scan without DICOM headers ({scan.where})",
                         label.sop_instance_uid)  # fmt: skip
    frames = {one.frame_of_reference for one in scan.images if one.series_uid == scan.series_uid}
    for image in scan.images:
        if image.sop_instance_uid == label.sop_instance_uid and image.frame_of_reference in frames:
            if not image.axial:
                raise InputError(label.source, "sop_instance_uid", "an axial image",
                                 f"{image.sop_instance_uid}, coronal or sagittal")  # fmt: skip
            return image.z_lps_mm
    raise InputError(label.source, "sop_instance_uid", f"an image of the scan ({scan.where})",
                     label.sop_instance_uid)  # fmt: skip


_TAGS = [
    "SeriesInstanceUID", "SOPInstanceUID", "SeriesNumber", "InstanceNumber", "FrameOfReferenceUID",
    "Modality", "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "Rows",
    "Columns",
]  # fmt: skip


def _read_images(study: Study) -> tuple[DicomImage, ...]:
    """CT images of the study's folder, of all series: a report may name a neighbour."""
    images = []
    for file in sorted(path for path in study.path.iterdir() if path.is_file()):
        try:
            header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=_TAGS)
        except InvalidDicomError:
            continue
        if _is_image(header):
            images.append(_image(header))
    return tuple(images)


def _is_image(header: pydicom.Dataset) -> bool:
    return header.get("Modality") == "CT" and "ImagePositionPatient" in header


def _image(header: pydicom.Dataset) -> DicomImage:
    row, column = np.reshape([float(x) for x in header.ImageOrientationPatient], (2, 3))
    between_rows, between_columns = map(float, header.PixelSpacing)
    center = (
        np.array([float(x) for x in header.ImagePositionPatient])
        + row * between_columns * (header.Columns - 1) / 2
        + column * between_rows * (header.Rows - 1) / 2
    )
    return DicomImage(
        str(header.SeriesInstanceUID),
        str(header.get("SOPInstanceUID", "")),
        _integer(header.get("SeriesNumber")),
        _integer(header.get("InstanceNumber")),
        str(header.get("FrameOfReferenceUID", "")),
        int(np.abs(np.cross(row, column)).argmax()) == 2,
        float(center[2]),
    )


def _integer(value: object) -> int | None:
    return int(str(value)) if value not in (None, "") else None
