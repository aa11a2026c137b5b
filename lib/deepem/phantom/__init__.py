"""Seeded synthetic chest CTs with truth: hard enough for a detector to be neither at 0 nor at 1."""

from deepem.phantom.chest import SIZES, Phantom, PhantomNodule, make_phantom
from deepem.phantom.write import write_dicom_series, write_phantoms

__all__ = [
    "SIZES",
    "Phantom",
    "PhantomNodule",
    "make_phantom",
    "write_dicom_series",
    "write_phantoms",
]
