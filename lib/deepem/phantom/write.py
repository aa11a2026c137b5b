"""A set of phantoms on disk: images, lobe maps, annotations, weak labels, and the whole truth."""

from __future__ import annotations

import gzip
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from deepem.files import atomic_path, write_json
from deepem.geometry import RAS_TO_LPS, Grid
from deepem.nodule import Nodule, WeakLabel
from deepem.phantom.chest import Phantom, make_phantom
from deepem.tables import write_annotations, write_series, write_weak_labels

RESCALE_INTERCEPT = -1024


def scan_seed(seed: int, number: int) -> int:
    """Seed of scan ``number`` in a run with ``seed``; the length of the run does not matter."""
    sequence = np.random.SeedSequence(seed, spawn_key=(number,))
    return int(sequence.generate_state(1, np.uint64)[0])


def write_phantoms(
    out: Path | str,
    count: int,
    seed: int,
    size: str = "mini",
    dicom: bool = False,
    on_scan: Callable[[Phantom], None] | None = None,
    nodule_count: int | None = None,
) -> None:
    """Write ``count`` phantoms to the folder ``out``; a second run gives the same bytes.

    Per scan `<series UID>.nii.gz`, or with ``dicom`` a folder `<series UID>` of DICOM files, and
    `lobes/<series UID>.nii.gz`; for all of them `annotations.csv`, `series.csv` (clean scans have
    no row in the annotations), `weak_labels.csv` and `truth.json`, which are written last. Every
    second DICOM series has its InstanceNumbers from the feet, as some scanners do.
    ``on_scan`` is called after each scan. nodule_count: in every scan, by default drawn.
    """
    if count < 1:
        raise ValueError(f"count: expected 1 or more, got {count}")
    out = Path(out)
    annotations: dict[str, list[Nodule]] = {}
    weak_labels: list[WeakLabel] = []
    truth: list[dict] = []
    for number in range(count):
        own_seed = scan_seed(seed, number)
        phantom = make_phantom(own_seed, size, nodule_count)
        if dicom:
            write_dicom_series(phantom, out / phantom.series_uid, from_feet=number % 2 == 1)
        else:
            _write_nifti(out / f"{phantom.series_uid}.nii.gz", phantom.hu, phantom.grid)
        _write_nifti(out / "lobes" / f"{phantom.series_uid}.nii.gz", phantom.lobes, phantom.grid)
        annotations[phantom.series_uid] = [item.nodule for item in phantom.nodules]
        weak_labels += phantom.weak_labels
        truth.append(_truth(phantom, own_seed))
        if on_scan:
            on_scan(phantom)
    write_annotations(out / "annotations.csv", annotations)
    write_series(out / "series.csv", annotations)
    write_weak_labels(out / "weak_labels.csv", weak_labels)
    write_json(out / "truth.json", {"seed": seed, "size": size, "scans": truth})


def _truth(phantom: Phantom, seed: int) -> dict:
    """One scan of `truth.json`."""
    return {
        "seriesuid": phantom.series_uid,
        "seed": seed,
        "shape": list(phantom.grid.shape),
        "affine_lps_mm": phantom.grid.affine_lps_mm.tolist(),
        "nodules": [
            {
                "center_lps_mm": list(item.nodule.center_lps_mm),
                "diameter_mm": item.nodule.diameter_mm,
                "kind": item.kind,
                "shape": item.shape,
                "attachment": item.attachment,
                "lobe": item.lobe.value,
                "slice_one_at_head": label.slice_number,
            }
            for item, label in zip(phantom.nodules, phantom.weak_labels, strict=True)
        ],
    }


def _write_nifti(path: Path, voxels: np.ndarray, grid: Grid) -> None:
    image = nib.Nifti1Image(voxels, RAS_TO_LPS @ grid.affine_lps_mm)
    image.header.set_xyzt_units("mm")
    with atomic_path(path) as aside:
        # No file name and no time in the gzip header: the same voxels give the same bytes.
        aside.write_bytes(gzip.compress(image.to_bytes(), compresslevel=3, mtime=0))


def write_dicom_series(phantom: Phantom, folder: Path | str, from_feet: bool = False) -> None:
    """Write `0001.dcm`, ...: axial CT images, InstanceNumber 1 at the head or ``from_feet``.

    The folder takes the place of an older one when it is complete.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = folder.with_name(f".{secrets.token_hex(4)}.{folder.name}")
    aside.mkdir()
    try:
        slices = phantom.grid.shape[2]
        for number in range(1, slices + 1):
            k = number - 1 if from_feet else slices - number
            dataset = _dicom_slice(phantom, k, number)
            dataset.save_as(aside / f"{number:04d}.dcm", write_like_original=False)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _dicom_slice(phantom: Phantom, k: int, number: int) -> FileDataset:
    """Slice ``k`` as a CT image; columns run along i, rows along j."""
    uid = phantom.series_uid
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[uid, "image", str(number)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    image.is_little_endian, image.is_implicit_VR = True, False
    image.SOPClassUID = meta.MediaStorageSOPClassUID
    image.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    image.SpecificCharacterSet = "ISO_IR 100"
    image.ImageType = ["DERIVED", "SECONDARY", "AXIAL"]
    image.StudyDate = image.SeriesDate = image.ContentDate = "20000101"
    image.StudyTime = image.ContentTime = "000000"
    image.Modality = "CT"
    image.Manufacturer = "DeepEM phantom"
    image.StudyDescription = image.SeriesDescription = "Synthetic chest CT"
    image.PatientName = "Phantom^Chest"
    image.PatientID = f"phantom-{uid[-12:]}"
    image.PatientBirthDate = image.PatientSex = ""
    image.AccessionNumber = image.ReferringPhysicianName = ""
    image.BodyPartExamined = "CHEST"
    image.KVP = "120"
    image.StudyInstanceUID = generate_uid(entropy_srcs=[uid, "study"])
    image.SeriesInstanceUID = uid
    image.FrameOfReferenceUID = generate_uid(entropy_srcs=[uid, "frame"])
    image.PositionReferenceIndicator = ""
    image.StudyID = image.SeriesNumber = image.AcquisitionNumber = "1"
    image.InstanceNumber = str(number)
    image.PatientPosition = "HFS"
    spacing = phantom.grid.spacing_mm
    position = phantom.grid.to_world(np.array([0, 0, k]))
    image.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
    image.ImagePositionPatient = [f"{value:.6f}" for value in position]
    image.SliceLocation = f"{position[2]:.6f}"
    image.SliceThickness = image.SpacingBetweenSlices = f"{spacing[2]:.6g}"
    image.PixelSpacing = [f"{spacing[1]:.6g}", f"{spacing[0]:.6g}"]
    image.SamplesPerPixel = 1
    image.PhotometricInterpretation = "MONOCHROME2"
    image.Columns, image.Rows = phantom.grid.shape[:2]
    image.BitsAllocated, image.BitsStored, image.HighBit = 16, 16, 15
    image.PixelRepresentation = 0
    image.RescaleIntercept, image.RescaleSlope = str(RESCALE_INTERCEPT), "1"
    image.RescaleType = "HU"
    image.WindowCenter, image.WindowWidth = "-600", "1500"
    image.PixelData = (phantom.hu[:, :, k].T - RESCALE_INTERCEPT).astype("<u2").tobytes()
    return image
