"""Fifty DICOM series, good and bad, mixed in ten folders: no bad one takes a good one with it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
import pytest
from series import write_dicom
from test_masks import oblique

from deepem.errors import InputError
from deepem.volume import find_studies, read_volume

SHAPE = (12, 10, 6)
UPRIGHT = oblique((0.7, 0.8, 2.5), SHAPE)
GOOD = {
    "head first": (UPRIGHT, lambda k, count: count - k),
    "feet first": (UPRIGHT, lambda k, count: k + 1),
    "no order": (UPRIGHT, lambda k, count: (k * 5) % count + 10),
    "tilted": (oblique((0.7, 0.7, 2.5), SHAPE, shear=0.6), lambda k, count: k + 1),
    "turned": (oblique((0.7, 0.8, 2.0), SHAPE, (10, -15, 8)), lambda k, count: 1),
}
BAD = {
    "missing slices": r"a slice every 2\.500 mm, got 5\.000 mm",
    "single slice": "slices: expected at least 2, got 1",
    "four dimensions": r"slice positions: expected one image at each, got 6 of 12",
    "multi-frame": "NumberOfFrames: expected 1",
    "no position": "DICOM header: expected position",
    "cut pixels": "DICOM pixels: expected readable slices",
    "two sizes": "shape: expected",
    "thick slices": "voxel spacing: expected at most 8 mm, got 9 mm",
    "no air": "voxels: expected HU with air",
}


@dataclass(frozen=True)
class Case:
    kind: str
    folder: Path
    hu: np.ndarray
    grid: object


def change(files: list[Path], **values: object) -> None:
    for file in files:
        header = pydicom.dcmread(file)
        for tag, value in values.items():
            setattr(header, tag, value)
        header.save_as(file)


def write_bad(kind: str, folder: Path, hu: np.ndarray) -> str:
    grid = oblique((0.7, 0.8, 9.0), SHAPE) if kind == "thick slices" else UPRIGHT
    hu = np.abs(hu) if kind == "no air" else hu
    hu = hu[:, :, :1] if kind == "single slice" else hu
    uid = write_dicom(folder, hu, grid.affine_lps_mm)
    files = sorted(folder.glob(f"*_{uid[-6:]}.dcm"))
    inner = next((f for f in files if pydicom.dcmread(f).InstanceNumber == 3), files[0])
    if kind == "missing slices":
        inner.unlink()
    elif kind == "four dimensions":
        again = write_dicom(folder, hu, grid.affine_lps_mm)
        study = pydicom.dcmread(files[0]).StudyInstanceUID
        more = sorted(folder.glob(f"*_{again[-6:]}.dcm"))
        change(more, SeriesInstanceUID=uid, StudyInstanceUID=study)
    elif kind == "multi-frame":
        change(files[:1], NumberOfFrames=2)
    elif kind == "no position":
        change(files[2:3], ImagePositionPatient=None)
    elif kind == "cut pixels":
        inner.write_bytes(inner.read_bytes()[:-100])
    elif kind == "two sizes":
        change(files[:1], Rows=5)
    return uid


@pytest.fixture(scope="module")
def fifty(tmp_path_factory) -> tuple[Path, dict[str, Case]]:
    root, rng, cases = tmp_path_factory.mktemp("mixed"), np.random.default_rng(3), {}
    kinds = [*GOOD, "good beside no CT", *BAD] * 4
    for number, kind in enumerate(kinds[:50]):
        folder = root / f"folder{number % 10}"
        hu = rng.integers(-1000, 400, SHAPE).astype(np.int16)
        if kind in BAD:
            cases[write_bad(kind, folder, hu)] = Case(kind, folder, hu, None)
        else:
            grid, order = GOOD.get(kind, GOOD["head first"])
            uid = write_dicom(folder, hu, grid.affine_lps_mm, number=order)
            cases[uid] = Case(kind, folder, hu, grid)
            if kind == "good beside no CT":
                write_dicom(folder, hu, modality="MR")
    (root / "folder3" / "rubbish.dcm").write_bytes(b"\0" * 128 + b"DICM" + bytes(range(256)) * 9)
    (root / "mr").mkdir()
    write_dicom(root / "mr", hu, modality="MR")
    return root, cases


def test_all_good_ones_are_read_and_each_bad_one_says_why(fifty):
    root, cases = fifty
    assert len(cases) == 50 and {case.kind for case in cases.values()} >= GOOD.keys() | BAD.keys()
    refused: list[InputError] = []
    read = {}
    for study in find_studies(root, refused.append):
        try:
            read[study.series_uid] = read_volume(study.path, study.series_uid)
        except InputError as error:
            refused.append(error)
    good = {uid: case for uid, case in cases.items() if case.kind not in BAD}
    assert read.keys() == good.keys()
    for uid, case in good.items():
        np.testing.assert_array_equal(read[uid].hu, case.hu)
        np.testing.assert_allclose(read[uid].grid.affine_lps_mm, case.grid.affine_lps_mm, atol=1e-5)
    reasons = [str(error) for error in refused]
    for kind, message in BAD.items():
        count = sum(case.kind == kind for case in cases.values())
        told = [one for one in refused if re.search(message, str(one))]
        assert len(told) == count, (kind, reasons)
    assert any("rubbish.dcm: " in reason for reason in reasons)
    assert any("other modalities: " in reason and str(root / "mr") in reason for reason in reasons)
    assert len(refused) == 50 - len(good) + 2


def test_without_a_listener_the_first_broken_series_is_raised(fifty):
    with pytest.raises(InputError):
        find_studies(fifty[0])
