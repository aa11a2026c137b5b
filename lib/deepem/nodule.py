"""Domain values: what a reader or a detector says about a scan. A value that exists is valid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

MAX_DIAMETER_MM = 100.0

ATTENUATIONS = ("solid", "part_solid", "ground_glass")
MARGINS = ("smooth", "lobulated", "spiculated", "poorly_defined")


@dataclass(frozen=True)
class Nodule:
    """A sphere in the patient: centre in LPS mm and diameter in mm."""

    center_lps_mm: tuple[float, float, float]
    diameter_mm: float

    def __post_init__(self) -> None:
        center = tuple(float(value) for value in self.center_lps_mm)
        if len(center) != 3 or not all(map(math.isfinite, center)):
            raise ValueError(f"center_lps_mm: expected three finite numbers, got {center}")
        diameter = float(self.diameter_mm)
        if not 0 < diameter <= MAX_DIAMETER_MM:  # also refuses NaN
            raise ValueError(f"diameter_mm: expected (0, {MAX_DIAMETER_MM:g}], got {diameter}")
        object.__setattr__(self, "center_lps_mm", center)
        object.__setattr__(self, "diameter_mm", diameter)


@dataclass(frozen=True)
class Proposal:
    """A nodule that the detector proposes, with its score before the sigmoid."""

    nodule: Nodule
    logit: float

    def __post_init__(self) -> None:
        if not math.isfinite(self.logit):
            raise ValueError(f"logit: expected a finite number, got {self.logit}")

    @property
    def probability(self) -> float:
        """Logistic of the logit, in 0..1."""
        if self.logit >= 0:
            return 1.0 / (1.0 + math.exp(-self.logit))
        return math.exp(self.logit) / (1.0 + math.exp(self.logit))


class Lobe(Enum):
    """The six lobes of the weak-label model (the lingula counts as one)."""

    RUL = "RUL"
    RML = "RML"
    RLL = "RLL"
    LUL = "LUL"
    LINGULA = "lingula"
    LLL = "LLL"

    @classmethod
    def parse(cls, text: str) -> Lobe:
        """Lobe of its short name in any case; ValueError with the choices otherwise."""
        for lobe in cls:
            if text.strip().lower() == lobe.value.lower():
                return lobe
        raise ValueError(f"lobe: expected one of {[lobe.value for lobe in cls]}, got {text!r}")


class SliceConvention(Enum):
    """Where a slice number starts and which way it runs."""

    DICOM_INSTANCE = "dicom_instance"  # the InstanceNumber of the DICOM file
    ONE_AT_HEAD = "one_at_head"
    ZERO_AT_FEET = "zero_at_feet"
    UNDECLARED = "undeclared"  # nobody said; to be found out over the corpus, or refused


@dataclass(frozen=True)
class WeakLabel:
    """One nodule as a record reports it: roughly where, never exactly.

    ``lobe`` and the slice are None when unknown. The slice is either ``slice_number`` with its
    ``slice_convention``, or the ``sop_instance_uid`` of a DICOM image, or ``z_lps_mm``; never two
    of them. A number of DICOM images may say of which
    series of the study it is (``series_number``); without, it is one of ``series_uid``.
    ``attenuation`` and ``margin`` are one of `ATTENUATIONS` and `MARGINS`. ``source`` is where a
    person can look it up: file and row, or file and character span.
    """

    series_uid: str
    lobe: Lobe | None = None
    slice_number: int | None = None
    slice_convention: SliceConvention | None = None
    z_lps_mm: float | None = None
    diameter_mm: float | None = None
    attenuation: str | None = None
    source: str = ""
    margin: str | None = None
    series_number: int | None = None
    sop_instance_uid: str | None = None

    def __post_init__(self) -> None:
        if not self.series_uid:
            raise ValueError("series_uid: expected a name, got an empty text")
        if (self.slice_number is None) != (self.slice_convention is None):
            raise ValueError(
                "slice_convention: expected one exactly where slice_number is given, "
                f"got {self.slice_number} and {self.slice_convention}"
            )
        if sum(one is not None for one in (self.slice_number, self.sop_instance_uid,
                                           self.z_lps_mm)) > 1:  # fmt: skip
            raise ValueError(
                "z_lps_mm: expected a slice number, a SOP instance UID or a z, got more than one"
            )
        if self.slice_number is not None and self.slice_number < 0:
            raise ValueError(f"slice_number: expected 0 or more, got {self.slice_number}")
        if self.z_lps_mm is not None and not math.isfinite(self.z_lps_mm):
            raise ValueError(f"z_lps_mm: expected a finite number, got {self.z_lps_mm}")
        if self.diameter_mm is not None and not 0 < self.diameter_mm <= MAX_DIAMETER_MM:
            raise ValueError(
                f"diameter_mm: expected (0, {MAX_DIAMETER_MM:g}], got {self.diameter_mm}"
            )
        if self.series_number is not None and (
            self.slice_convention is not SliceConvention.DICOM_INSTANCE
        ):
            raise ValueError(
                f"series_number: expected only with dicom_instance, got {self.slice_convention}"
            )
        for field, choices in (("attenuation", ATTENUATIONS), ("margin", MARGINS)):
            value = getattr(self, field)
            if value is not None and value not in choices:
                raise ValueError(f"{field}: expected one of {choices}, got {value!r}")

    @property
    def to_be_placed(self) -> bool:
        """Whether its slice still has to be looked up in the scan."""
        return self.slice_number is not None or self.sop_instance_uid is not None


@dataclass(frozen=True)
class CleanStatement:
    """A record that says of a scan: no nodules."""

    series_uid: str
    source: str = ""

    def __post_init__(self) -> None:
        if not self.series_uid:
            raise ValueError("series_uid: expected a name, got an empty text")
