"""Nodules as DICOM SEG, read back by highdicom and by what MONAI Label reads with."""

from __future__ import annotations

from pathlib import Path

import highdicom as hd
import numpy as np
import pydicom
import pydicom_seg
import pytest
from series import write_dicom
from test_masks import oblique

from deepem.dicom import nodule_seg, read_source
from deepem.dicom import write_dicom as write_file
from deepem.errors import InputError
from deepem.geometry import Grid
from deepem.masks import nodule_mask
from deepem.nodule import Nodule
from deepem.volume import read_volume

NODULES = [Nodule((6.0, -4.0, 3.0), 8.0), Nodule((-9.0, 5.0, -11.0), 4.0)]

SERIES = {
    "head_first": (oblique((0.7, 0.7, 2.5), (60, 56, 20)), lambda k, count: count - k),
    "feet_first": (oblique((0.7, 0.8, 2.5), (60, 56, 20)), lambda k, count: k + 1),
    "no_order": (oblique((0.8, 0.7, 5.0), (60, 56, 12)), lambda k, count: (k * 7) % count + 3),
    "oblique": (oblique((0.7, 0.8, 2.0), (60, 56, 24), (15, -20, 8)), lambda k, count: k + 1),
    "tilted": (oblique((0.7, 0.7, 2.5), (60, 64, 20), shear=0.8), lambda k, count: k + 1),
}


@pytest.fixture(params=SERIES)
def folder(request, tmp_path, rng) -> Path:
    grid, number = SERIES[request.param]
    hu = rng.integers(-1000, 400, grid.shape).astype(np.int16)
    write_dicom(tmp_path / "ct", hu, grid.affine_lps_mm, number=number)
    return tmp_path / "ct"


def test_frames_refer_to_the_slices_on_which_the_nodules_lie(folder, tmp_path):
    source = read_source(folder)
    write_file(nodule_seg(NODULES, source), tmp_path / "seg.dcm")
    seg = hd.seg.segread(str(tmp_path / "seg.dcm"))
    mask = nodule_mask(NODULES, source.grid)
    assert seg.number_of_segments == 1
    assert seg.NumberOfFrames == np.count_nonzero(mask.any((0, 1))) < len(source.headers)
    uids = [str(header.SOPInstanceUID) for header in source.headers]
    frames = seg.get_pixels_by_source_instance(uids, ignore_spatial_locations=True,
                                               assert_missing_frames_are_empty=True)  # fmt: skip
    np.testing.assert_array_equal(frames[..., 0].transpose(2, 1, 0), mask)
    for header, frame in zip(source.headers, mask.transpose(2, 1, 0), strict=True):
        z = [float(value) for value in header.ImagePositionPatient]
        rows, columns = np.nonzero(frame)
        step = [float(value) for value in header.PixelSpacing]
        axes = np.reshape([float(value) for value in header.ImageOrientationPatient], (2, 3))
        at = z + columns[:, None] * step[1] * axes[0] + rows[:, None] * step[0] * axes[1]
        for point in at:  # the geometry of the file itself, without our Grid
            nearest = min(np.linalg.norm(point - n.center_lps_mm) - n.diameter_mm / 2
                          for n in NODULES)  # fmt: skip
            assert nearest <= source.grid.spacing_mm.max() / 2 + 0.5


@pytest.mark.parametrize("folder", sorted(SERIES.keys() - {"tilted"}), indirect=True)
def test_the_reader_of_monai_label_finds_the_nodules_in_place(folder, tmp_path):
    """Without the tilted series: that reader stacks frames upright, wherever they say they lie."""
    source = read_source(folder)
    write_file(nodule_seg(NODULES, source), tmp_path / "seg.dcm")
    result = pydicom_seg.SegmentReader().read(pydicom.dcmread(tmp_path / "seg.dcm"))
    image = result.segment_image(1)
    voxels = result.segment_data(1).transpose(2, 1, 0)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    points = Grid(affine, voxels.shape).to_world(np.argwhere(voxels))
    distance = np.linalg.norm(points[:, None] - [n.center_lps_mm for n in NODULES], axis=-1)
    assert set(distance.argmin(1)) == {0, 1}
    slack = np.linalg.norm(source.grid.spacing_mm) / 2
    assert (distance - [n.diameter_mm / 2 for n in NODULES]).min(1).max() <= slack


def test_it_says_what_and_of_whom_it_is(tmp_path, rng):
    grid, _ = SERIES["head_first"]
    hu = rng.integers(-1000, 400, grid.shape).astype(np.int16)
    uid = write_dicom(tmp_path / "ct", hu, grid.affine_lps_mm, patient="Jane")
    source = read_source(tmp_path / "ct")
    seg = nodule_seg(NODULES, source)
    description = seg.get_segment_description(1)
    assert description.segmented_property_type.meaning == "Nodule"
    assert description.algorithm_type.value == "MANUAL"
    assert (seg.PatientID, seg.StudyInstanceUID) == ("Jane", source.headers[0].StudyInstanceUID)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == uid
    assert seg.SOPInstanceUID != nodule_seg(NODULES, source).SOPInstanceUID


def test_nothing_to_draw_is_refused(folder):
    source = read_source(folder)
    with pytest.raises(InputError, match="one inside the CT for a SEG, got no nodule"):
        nodule_seg([], source)
    with pytest.raises(InputError, match="one inside the CT for a SEG, got none of 1"):
        nodule_seg([Nodule((0, 0, 500), 5)], source)


def test_the_headers_are_in_the_order_of_the_voxels(folder):
    source, volume = read_source(folder), read_volume(folder)
    np.testing.assert_allclose(source.grid.affine_lps_mm, volume.grid.affine_lps_mm)
    for k, header in enumerate(source.headers):
        np.testing.assert_allclose(source.grid.to_world(np.array([0, 0, k])),
                                   [float(x) for x in header.ImagePositionPatient],
                                   atol=1e-4)  # fmt: skip


def test_a_series_that_nothing_can_refer_to_is_refused(tmp_path, rng):
    grid, _ = SERIES["head_first"]
    write_dicom(tmp_path / "ct", rng.integers(-1000, 400, grid.shape).astype(np.int16))
    file = next((tmp_path / "ct").iterdir())
    header = pydicom.dcmread(file)
    del header.FrameOfReferenceUID
    header.save_as(file)
    with pytest.raises(InputError, match="FrameOfReferenceUID: expected a UID"):
        read_source(tmp_path / "ct")
