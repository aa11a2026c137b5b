"""Slice numbers to mm: conventions, DICOM headers, and the direction of a corpus."""

from __future__ import annotations

import json
import math
import tarfile
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from deepem.errors import InputError
from deepem.geometry import RAS_TO_LPS, Grid
from deepem.nodule import Lobe, SliceConvention, WeakLabel
from deepem.phantom import make_phantom
from deepem.volume import Study, find_studies, read_grid, read_volume
from deepem.weak_labels import (
    ScanSlices,
    direction_evidence,
    in_patient_space,
    read_slices,
    slices_of_headers,
    z_lps_mm,
)

HEAD, FEET = SliceConvention.ONE_AT_HEAD, SliceConvention.ZERO_AT_FEET
DICOM, UNDECLARED = SliceConvention.DICOM_INSTANCE, SliceConvention.UNDECLARED

UPWARDS = np.array([[0.7, 0, 0, -100], [0, 0.8, 0, -90], [0, 0, 2.5, -300], [0, 0, 0, 1]], float)
DOWNWARDS = np.array([[0.7, 0, 0, -100], [0, 0.8, 0, -90], [0, 0, -2.5, -227.5], [0, 0, 0, 1]])
SHAPE = (10, 20, 30)  # z of the slices: -300, -297.5, ..., -227.5


def scan(affine=UPWARDS, shape=SHAPE, images=()):
    return ScanSlices("s.nii.gz", "s", Grid(affine, shape), images)


def label(number, convention, **fields):
    return WeakLabel(
        "s", slice_number=number, slice_convention=convention, source="w.csv, row 2", **fields
    )


@pytest.mark.parametrize("affine", [UPWARDS, DOWNWARDS])
@pytest.mark.parametrize(
    ("number", "convention", "z"),
    [(1, HEAD, -227.5), (30, HEAD, -300), (3, HEAD, -232.5),
     (0, FEET, -300), (29, FEET, -227.5), (2, FEET, -295)],
)  # fmt: skip
def test_a_number_is_a_height_however_the_axis_runs(affine, number, convention, z):
    assert z_lps_mm(label(number, convention), scan(affine)) == pytest.approx(z)


def test_slices_may_lie_along_any_axis_of_the_array():
    # i runs from head to feet by 3 mm, j to the left, k to the back.
    affine = np.array([[0, 1, 0, 0], [0, 0, 1, 0], [-3, 0, 0, 90], [0, 0, 0, 1]], float)
    assert z_lps_mm(label(2, HEAD), scan(affine)) == 87
    assert z_lps_mm(label(2, FEET), scan(affine)) == 90 - 7 * 3


def test_an_oblique_slice_has_its_height_in_the_middle_of_the_volume():
    tilted = UPWARDS.copy()
    tilted[2, 1] = 0.5  # 20 rows: the middle is at row 9.5
    assert z_lps_mm(label(1, FEET), scan(tilted)) == pytest.approx(-297.5 + 0.5 * 9.5)


def test_height_runs_from_face_to_face():
    heights = [scan().height(z) for z in (-301.25, -300, -227.5, -226.25)]
    assert heights == pytest.approx([0, 0.5 / 30, 29.5 / 30, 1])


def test_a_z_needs_no_scan_and_no_slice_has_no_z():
    assert z_lps_mm(WeakLabel("s", z_lps_mm=-7.0), scan()) == -7
    assert z_lps_mm(WeakLabel("s", Lobe.RUL), scan()) is None


@pytest.mark.parametrize(
    ("number", "convention", "message"),
    [
        (0, HEAD, r"row 2: slice_number: expected 1 to 30 \(one_at_head, s.nii.gz\), got 0"),
        (31, HEAD, "expected 1 to 30 .* got 31"),
        (30, FEET, r"slice_number: expected 0 to 29 \(zero_at_feet, s.nii.gz\), got 30"),
        (3, DICOM, "slice_convention: expected one_at_head or zero_at_feet, or the DICOM headers"),
        (3, UNDECLARED, "slice_convention: expected dicom_instance, one_at_head .* got none"),
    ],
)
def test_a_number_that_is_not_in_the_scan(number, convention, message):
    with pytest.raises(InputError, match=message):
        z_lps_mm(label(number, convention), scan())


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.mha", "a.nrrd"])
def test_headers_alone_give_the_grid_of_the_volume(tmp_path, rng, name):
    hu = rng.integers(-1000, 400, (*SHAPE, 1)).astype(np.int16)
    path = tmp_path / name
    if ".nii" in name:
        nib.save(nib.Nifti1Image(hu, RAS_TO_LPS @ DOWNWARDS), path)
    else:
        image = sitk.GetImageFromArray(hu[..., 0].transpose(2, 1, 0))
        image.SetSpacing((0.7, 0.8, 2.5))
        image.SetDirection((1, 0, 0, 0, 1, 0, 0, 0, -1))
        image.SetOrigin((-100, -90, -227.5))
        sitk.WriteImage(image, str(path))
    grid, expected = read_grid(path), read_volume(path).grid
    assert grid.shape == expected.shape == SHAPE
    np.testing.assert_array_equal(grid.affine_lps_mm, expected.affine_lps_mm)
    np.testing.assert_allclose(grid.affine_lps_mm, DOWNWARDS, atol=1e-5)
    if ".nii" not in name:
        path.write_bytes(path.read_bytes()[:40])
        with pytest.raises(InputError, match="file: expected a readable image"):
            read_grid(path)


@pytest.mark.parametrize("name", ["none.nii.gz", "text.txt"])
def test_a_grid_of_nothing(tmp_path, name):
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(InputError, match="image: expected a DICOM folder or one of"):
        read_grid(tmp_path / name)
    (tmp_path / "a.nii.gz").write_bytes(b"not gzip")
    with pytest.raises(InputError, match="file: expected a readable NIfTI image"):
        read_grid(tmp_path / "a.nii.gz")


def write_headers(folder, uid, number, z_mm, orientation=(1, 0, 0, 0, 1, 0), frame="1.9"):
    """Headers of one series: InstanceNumber 1, 2, ... at the heights ``z_mm``."""
    folder.mkdir(exist_ok=True)
    for instance, z in enumerate(z_mm, start=1):
        file = pydicom.Dataset()
        file.SOPClassUID, file.SOPInstanceUID = CTImageStorage, generate_uid()
        file.SeriesInstanceUID, file.SeriesNumber, file.InstanceNumber = uid, number, instance
        file.Modality, file.FrameOfReferenceUID = "CT", frame
        file.ImagePositionPatient = [-100, -90, z]
        file.ImageOrientationPatient = list(orientation)
        file.PixelSpacing, file.Rows, file.Columns = [0.8, 0.7], 20, 10
        file.file_meta = pydicom.dataset.FileMetaDataset()
        file.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file.file_meta.MediaStorageSOPClassUID = CTImageStorage
        file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID
        file.is_little_endian, file.is_implicit_VR = True, False
        file.save_as(folder / f"{uid}_{instance}.dcm", write_like_original=False)


@pytest.fixture
def dicom(tmp_path):
    """The series 2 with 1 at the head, and beside it a thin, a coronal and a foreign one."""
    folder = tmp_path / "study"
    write_headers(folder, "1.2", 2, [-10, -15, -20, -25])
    write_headers(folder, "1.3", 3, [-10, -11, -12])
    write_headers(folder, "1.4", 4, [-10, -10, -10], orientation=(1, 0, 0, 0, 0, -1))
    write_headers(folder, "1.5", 5, [0, 5, 10], frame="1.8")
    return read_slices(Study("1.2", folder, "p"))


def test_the_headers_decide_where_there_are_any(dicom):
    assert dicom.grid.shape == (10, 20, 4)
    assert z_lps_mm(label(2, DICOM), dicom) == -15
    assert z_lps_mm(label(2, UNDECLARED), dicom) == -15
    assert z_lps_mm(label(2, HEAD), dicom) == -15
    assert z_lps_mm(label(0, FEET), dicom) == -25


def test_a_number_belongs_to_the_series_that_the_report_names(dicom):
    assert z_lps_mm(label(2, DICOM, series_number=3), dicom) == -11
    for number, series, message in [
        (9, None, r"slice_number: expected an InstanceNumber of the series, 1 to 4 .* got 9"),
        (4, 3, r"InstanceNumber of the series, 1 to 3"),
        (2, 7, r"row 2: series_number: expected one of \[2, 3, 4, 5\] .* got 7"),
        (2, 4, "series_number: expected a series of axial images"),
        (2, 5, r"series_number: expected one of"),  # not in the same frame of reference
    ]:
        with pytest.raises(InputError, match=message):
            z_lps_mm(label(number, DICOM, series_number=series), dicom)


def test_an_image_is_found_by_its_uid_in_the_scan_or_beside_it(dicom):
    def uid(series, at=1):
        return [one.sop_instance_uid for one in dicom.images if one.series_uid == series][at]

    def named(sop_instance_uid):
        return WeakLabel("1.2", sop_instance_uid=sop_instance_uid, source="w.csv, row 2")

    assert z_lps_mm(named(uid("1.2")), dicom) == -15
    assert z_lps_mm(named(uid("1.3", 2)), dicom) == -12
    for wrong, message in [
        ("1.2.3", r"w.csv, row 2: sop_instance_uid: expected an image of the scan .* got 1\.2\.3"),
        (uid("1.5"), "expected an image of the scan"),  # not in the same frame of reference
        (uid("1.4"), "expected an axial image, got .*, coronal or sagittal"),
    ]:
        with pytest.raises(InputError, match=message):
            z_lps_mm(named(wrong), dicom)
    (placed,), (rejected,) = in_patient_space([named(uid("1.2")), named("1.2.3")], {"1.2": dicom})
    assert (placed.z_lps_mm, placed.sop_instance_uid) == (-15, None)
    assert rejected.field == "sop_instance_uid"
    with pytest.raises(InputError, match="expected nothing for a scan without DICOM headers"):
        z_lps_mm(named("1.2.3"), replace(dicom, images=()))


def test_headers_from_elsewhere_say_the_same_as_files(dicom):
    files = sorted(Path(dicom.where).iterdir(), reverse=True)
    headers = [pydicom.Dataset.from_json(pydicom.dcmread(file).to_json()) for file in files]
    told = slices_of_headers("the PACS", "1.2", headers)
    np.testing.assert_allclose(told.grid.affine_lps_mm, dicom.grid.affine_lps_mm)
    assert told.grid.shape == dicom.grid.shape
    assert set(told.images) == set(dicom.images)
    with pytest.raises(InputError, match="the PACS: DICOM series: expected at least one image"):
        slices_of_headers("the PACS", "1.7", headers)
    own = next(header for header in headers if header.SeriesInstanceUID == "1.2")
    del own.PixelSpacing
    with pytest.raises(InputError, match="DICOM header: expected position, orientation"):
        slices_of_headers("the PACS", "1.2", headers)


def test_a_number_that_is_there_twice_is_refused(dicom):
    first = next(image for image in dicom.images if image.series_uid == "1.2")
    twice = replace(dicom, images=(*dicom.images, replace(first, z_lps_mm=99.0)))
    with pytest.raises(InputError, match="InstanceNumber that is there once, got 1, at z"):
        z_lps_mm(label(first.instance_number, DICOM), twice)


def test_a_tilted_image_has_its_height_at_its_centre(tmp_path):
    tilt = math.radians(20)
    down = (1, 0, 0, 0, math.cos(tilt), math.sin(tilt))
    write_headers(tmp_path / "t", "1.2", 2, [-10, -15, -20], orientation=down)
    tilted = read_slices(Study("1.2", tmp_path / "t", "p"))
    expected = -15 + 0.8 * 9.5 * math.sin(tilt)
    assert z_lps_mm(label(2, DICOM), tilted) == pytest.approx(expected)
    assert z_lps_mm(label(2, HEAD), tilted) == pytest.approx(expected)


def test_labels_go_to_the_patient_one_by_one():
    labels = [
        label(3, HEAD, lobe=Lobe.RUL, diameter_mm=5.0),
        label(99, HEAD),
        WeakLabel("s", Lobe.LLL),
        WeakLabel("s", z_lps_mm=-250.0),
        WeakLabel("elsewhere", Lobe.LLL, source="w.csv, row 9"),
    ]
    placed, rejected = in_patient_space(labels, {"s": scan()})
    first = WeakLabel("s", Lobe.RUL, z_lps_mm=-232.5, diameter_mm=5.0, source="w.csv, row 2")
    assert placed == [first, labels[2], labels[3]]
    assert [str(error) for error in rejected] == [
        "w.csv, row 2: slice_number: expected 1 to 30 (one_at_head, s.nii.gz), got 99",
        "w.csv, row 9: seriesuid: expected a scan that is there, got elsewhere",
    ]


def undeclared(*lobes_and_numbers):
    return [label(number, UNDECLARED, lobe=lobe) for lobe, number in lobes_and_numbers]


HUNDRED = {"s": scan(shape=(10, 20, 100))}


def test_the_evidence_of_one_label_by_hand():
    # Slice 26 of 100: (100 - 26 + 0.5) / 100 = 0.745 from the head, 0.265 from the feet; the
    # median of the right upper lobe is at 0.743.
    def nats(height):
        normal = math.exp(-(((height - 0.743) / 0.15) ** 2) / 2) / (0.15 * math.sqrt(2 * math.pi))
        return math.log(0.9 * normal + 0.1)

    evidence = direction_evidence(undeclared((Lobe.RUL, 26)), HUNDRED)
    assert (evidence.labels, evidence.for_head, evidence.for_feet) == (1, 1, 0)
    assert evidence.head_nats == pytest.approx(nats(0.745))
    assert evidence.feet_nats == pytest.approx(nats(0.265))
    assert evidence.head_nats - evidence.feet_nats == pytest.approx(3.08, abs=0.01)


@pytest.mark.parametrize(
    ("labels", "convention"),
    [
        ([(Lobe.RUL, 25), (Lobe.LUL, 27), (Lobe.LUL, 30), (Lobe.LLL, 66)], HEAD),
        ([(Lobe.RUL, 75), (Lobe.LUL, 73), (Lobe.LUL, 70), (Lobe.LLL, 34)], FEET),
        # One wrong lobe among many does not turn the corpus.
        ([(Lobe.RUL, 25)] * 6 + [(Lobe.LUL, 75)], HEAD),
    ],
)
def test_a_corpus_shows_its_direction(labels, convention):
    labels = undeclared(*labels)
    assert direction_evidence(labels, HUNDRED).convention() is convention
    placed, rejected = in_patient_space(labels, HUNDRED)
    declared = [replace(one, slice_convention=convention) for one in labels]
    assert (placed, rejected) == (in_patient_space(declared, HUNDRED)[0], [])


@pytest.mark.parametrize(
    "labels",
    [
        [(Lobe.RUL, 25), (Lobe.LUL, 25)],  # 6 nats: two labels are not enough
        [(Lobe.RML, 50), (Lobe.LINGULA, 53)] * 20,  # lobes in the middle say nothing
        [(Lobe.RUL, 25)] * 70 + [(Lobe.RUL, 75)] * 30,  # two directions in one corpus
        [(None, 25)] * 9,
        [(Lobe.RUL, 100), (Lobe.RUL, 0)] * 9,  # possible from one end only
    ],
)
def test_an_unclear_direction_is_refused_and_the_evidence_shown(labels):
    labels = undeclared(*labels)
    reason = r"slice_convention: expected declared, or evidence of 6\.9 nats .* got \d+ labels: "
    with pytest.raises(InputError, match="^undeclared slice numbers: " + reason):
        direction_evidence(labels, HUNDRED).convention()
    placed, rejected = in_patient_space(labels, HUNDRED)
    assert (placed, len(rejected)) == ([], len(labels))
    with pytest.raises(InputError, match="^w.csv, row 2: " + reason):
        raise rejected[0]


def test_only_undeclared_numbers_are_evidence(dicom):
    labels = [label(25, HEAD, lobe=Lobe.RUL), WeakLabel("s", Lobe.RUL)]
    labels.append(replace(undeclared((Lobe.RUL, 2))[0], series_uid="1.2"))  # has headers
    labels.append(replace(undeclared((Lobe.RUL, 2))[0], series_uid="elsewhere"))
    assert direction_evidence(labels, HUNDRED | {"1.2": dicom}).labels == 0


def test_phantoms_are_counted_from_the_head():
    phantoms = [make_phantom(seed, "mini", nodule_count=4) for seed in range(5)]
    scans = {p.series_uid: ScanSlices("p", p.series_uid, p.grid) for p in phantoms}
    said = [one for phantom in phantoms for one in phantom.weak_labels]
    silent = [replace(one, slice_convention=UNDECLARED) for one in said]
    assert in_patient_space(silent, scans) == in_patient_space(said, scans)
    counts = {uid: one.count for uid, one in scans.items()}
    turned = [
        replace(one, slice_number=counts[one.series_uid] - one.slice_number) for one in silent
    ]
    assert direction_evidence(turned, scans).convention() is FEET


def test_real_headers_and_the_real_nodules(tmp_path, real_data):
    folder = real_data / "lidc_0063"
    with tarfile.open(folder / "dicom.tar.gz") as archive:
        archive.extractall(tmp_path)
    (study,) = find_studies(tmp_path)
    dicom = read_slices(study)
    nifti = read_slices(Study(study.series_uid, folder / "ct.nii.gz", "p"))
    assert dicom.count == nifti.count == len(dicom.images) == 133
    for number in range(1, 134):  # InstanceNumber 1 is at the head
        z = z_lps_mm(label(number, DICOM), dicom)
        assert z == pytest.approx(z_lps_mm(label(number, HEAD), nifti), abs=1e-3)
        assert z == pytest.approx(z_lps_mm(label(number, HEAD), dicom), abs=1e-3)
        assert z == pytest.approx(z_lps_mm(label(133 - number, FEET), nifti), abs=1e-3)
    for nodule in json.loads((folder / "nodules.json").read_text())["nodules"]:
        number = 133 - round(nodule["center_index_ijk"][2])
        z = nodule["center_world_LPS_mm"][2]
        assert abs(z_lps_mm(label(number, DICOM), dicom) - z) <= 1.26  # half a slice
    with pytest.raises(InputError, match="InstanceNumber of the series, 1 to 133"):
        z_lps_mm(label(134, DICOM), dicom)
