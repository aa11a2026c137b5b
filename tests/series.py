"""CT series as DICOM files, for the tests that need odd ones."""

from __future__ import annotations

import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AFFINE_LPS_MM = np.array(
    [[0.7, 0, 0, -100], [0, 0.8, 0, -90], [0, 0, 2.5, -300], [0, 0, 0, 1]], float
)


def write_dicom(
    folder, hu, affine_lps_mm=AFFINE_LPS_MM, *, series_uid=None, modality="CT", patient="P1",
    number=lambda k, count: count - k,
):  # fmt: skip
    """One file per slice, file names in no order, pixels stored with slope and intercept.

    number: InstanceNumber of slice k; by default 1 is at the head.
    """
    folder.mkdir(exist_ok=True)
    series_uid = series_uid or generate_uid()
    spacing = np.linalg.norm(affine_lps_mm[:3, :3], axis=0)
    row, column = (affine_lps_mm[:3, axis] / spacing[axis] for axis in (0, 1))
    for k in range(hu.shape[2]):
        file = pydicom.Dataset()
        file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, generate_uid()
        file.SeriesInstanceUID, file.Modality, file.PatientID = series_uid, modality, patient
        file.StudyInstanceUID = generate_uid(entropy_srcs=[series_uid, "study"])
        file.InstanceNumber = number(k, hu.shape[2])
        file.FrameOfReferenceUID = generate_uid(entropy_srcs=[series_uid, "frame"])
        file.SeriesNumber = 4
        file.ImagePositionPatient = [
            f"{x:.6f}" for x in affine_lps_mm[:3, 3] + k * affine_lps_mm[:3, 2]
        ]
        file.ImageOrientationPatient = [f"{x:.9f}" for x in (*row, *column)]
        file.PixelSpacing = [f"{spacing[1]:.6f}", f"{spacing[0]:.6f}"]
        file.Rows, file.Columns = hu.shape[1], hu.shape[0]
        file.SamplesPerPixel, file.PhotometricInterpretation = 1, "MONOCHROME2"
        file.BitsAllocated = file.BitsStored = 16
        file.HighBit, file.PixelRepresentation = 15, 0
        file.RescaleSlope, file.RescaleIntercept = 1, -1024
        file.PixelData = (hu[:, :, k].T + 1024).astype(np.uint16).tobytes()
        file.file_meta = pydicom.dataset.FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.file_meta.MediaStorageSOPClassUID = CTImageStorage
        file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID
        file.is_little_endian, file.is_implicit_VR = True, False
        file.save_as(
            folder / f"{(k * 7) % 31:03d}_{series_uid[-6:]}.dcm", write_like_original=False
        )
    return series_uid
