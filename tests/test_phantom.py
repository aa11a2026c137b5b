"""The phantoms and what they claim about themselves."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from scipy import ndimage

from deepem.nodule import Lobe, SliceConvention
from deepem.phantom import Phantom, PhantomNodule, make_phantom, write_phantoms
from deepem.volume import read_volume

NUMBER = {lobe: number for number, lobe in enumerate(Lobe, start=1)}


@pytest.fixture(scope="module")
def phantoms() -> list[Phantom]:
    return [make_phantom(seed, "mini", nodule_count=4) for seed in range(6)]


@pytest.fixture(scope="module")
def nodules(phantoms) -> list[tuple[Phantom, PhantomNodule]]:
    found = [(phantom, item) for phantom in phantoms for item in phantom.nodules]
    assert len(found) > 18
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, list[Phantom]]:
    folder = tmp_path_factory.mktemp("phantoms")
    phantoms: list[Phantom] = []
    write_phantoms(folder / "nifti", count=2, seed=3, on_scan=phantoms.append)
    return folder, phantoms


def distance_mm(phantom: Phantom, item: PhantomNodule) -> np.ndarray:
    """Of every voxel to the centre of the nodule; the phantoms are axis-aligned."""
    index = np.ogrid[tuple(map(slice, phantom.grid.shape))]
    start = phantom.grid.to_world(np.zeros(3)) - item.nodule.center_lps_mm
    squared = (
        (a * step + s) ** 2
        for a, step, s in zip(index, phantom.grid.spacing_mm, start, strict=True)
    )
    return np.sqrt(sum(squared))


def nearest_voxel(phantom: Phantom, item: PhantomNodule) -> tuple[int, ...]:
    index = np.rint(phantom.grid.to_index(np.array(item.nodule.center_lps_mm)))
    return tuple(index.astype(int).tolist())


def test_a_seed_gives_one_chest():
    first, second, other = make_phantom(11), make_phantom(11), make_phantom(12)
    assert np.array_equal(first.hu, second.hu)
    assert np.array_equal(first.lobes, second.lobes)
    assert first.nodules == second.nodules
    assert first.series_uid == second.series_uid != other.series_uid
    assert first.hu.shape != other.hu.shape or not np.array_equal(first.hu, other.hu)


def test_an_unknown_size_is_refused():
    with pytest.raises(ValueError, match="huge"):
        make_phantom(0, "huge")


def test_six_lobes_in_their_places(phantoms):
    for phantom in phantoms:
        index = [np.argwhere(phantom.lobes == number) for number in range(1, 7)]
        litres = np.array([len(i) for i in index]) * np.prod(phantom.grid.spacing_mm) / 1e6
        assert 0.15 < litres.sum() < 0.8  # 3-8 litres of an adult, at 150 / 330 of the size
        share = dict(zip(Lobe, litres / litres.sum(), strict=True))
        assert all(0.03 < value < 0.35 for value in share.values())
        assert share[Lobe.RML] < share[Lobe.RUL] and share[Lobe.RML] < share[Lobe.RLL]
        x, _, z = phantom.grid.to_world(np.array([i.mean(0) for i in index])).T
        x, z = dict(zip(Lobe, x, strict=True)), dict(zip(Lobe, z, strict=True))
        right, left = (Lobe.RUL, Lobe.RML, Lobe.RLL), (Lobe.LUL, Lobe.LINGULA, Lobe.LLL)
        assert max(x[lobe] for lobe in right) < min(x[lobe] for lobe in left)
        assert z[Lobe.RUL] > z[Lobe.RLL] and z[Lobe.RUL] > z[Lobe.RML]
        assert z[Lobe.LUL] > z[Lobe.LLL] and z[Lobe.LUL] > z[Lobe.LINGULA]


def test_tissues_have_their_hu(phantoms):
    for phantom in phantoms:
        lung = ndimage.binary_erosion(phantom.lobes > 0, iterations=3)
        assert -905 < np.median(phantom.hu[lung]) < -740
        assert 0.02 < (phantom.hu[lung] > -500).mean() < 0.25  # vessels and nodules
        assert (phantom.hu[phantom.lobes == 0] > 300).mean() > 0.001  # bone
        assert abs(np.median(phantom.hu[:, :3]) + 1000) < 30  # air before the chest


def test_mini_chests_cover_the_same_box_at_every_slice_thickness(phantoms):
    for phantom in phantoms:
        assert phantom.hu.dtype == np.int16 and phantom.lobes.dtype == np.uint8
        assert phantom.lobes.shape == phantom.grid.shape == phantom.hu.shape
        assert phantom.grid.shape[:2] == (160, 128)
        height = phantom.grid.shape[2] * phantom.grid.spacing_mm[2]
        assert abs(height - 128) <= phantom.grid.spacing_mm[2]
    assert len({phantom.grid.spacing_mm[2] for phantom in phantoms}) > 1


def test_nodules_lie_in_the_lobe_that_is_stated(nodules):
    for phantom, item in nodules:
        center = nearest_voxel(phantom, item)
        allowed = (
            {NUMBER[item.lobe], 0} if item.attachment == "juxta_pleural" else {NUMBER[item.lobe]}
        )
        assert phantom.lobes[center] in allowed
        near = distance_mm(phantom, item) < item.nodule.diameter_mm / 2 + 1
        assert (phantom.lobes[near] == NUMBER[item.lobe]).any()


def test_nodules_keep_their_size_range_and_apart(phantoms):
    for phantom in phantoms:
        sphere = [item.nodule for item in phantom.nodules]
        assert all(4 <= nodule.diameter_mm <= 20 for nodule in sphere)
        for n, one in enumerate(sphere):
            for other in sphere[:n]:
                gap = np.subtract(one.center_lps_mm, other.center_lps_mm)
                assert np.linalg.norm(gap) > (one.diameter_mm + other.diameter_mm) / 2


def test_solid_nodules_are_soft_tissue_and_ground_glass_is_not(nodules):
    core = {"solid": [], "ground_glass": []}
    for phantom, item in nodules:
        if item.kind in core and item.nodule.diameter_mm > 5:
            inside = distance_mm(phantom, item) < 0.3 * item.nodule.diameter_mm
            core[item.kind].append(np.median(phantom.hu[inside]))
    assert min(core["solid"]) > -250
    assert -800 < np.median(core["ground_glass"]) < -400


def test_nodules_are_drawn_where_and_as_wide_as_stated(phantoms):
    """The difference to the same chest without nodules shows each nodule alone, without noise."""
    checked = 0
    for seed, ill in enumerate(phantoms[:4]):
        clean = make_phantom(seed, nodule_count=0)
        assert not clean.nodules
        added = ill.hu.astype(np.int32) - clean.hu
        distance = [distance_mm(ill, item) for item in ill.nodules]
        elsewhere = np.min(distance, axis=0) > 2 * 20 + 5
        assert np.abs(added[elsewhere]).max() <= 1  # nothing else has changed
        for item, away in zip(ill.nodules, distance, strict=True):
            if item.shape == "spiculated" or (item.kind, item.attachment) != ("solid", "free"):
                continue
            if item.nodule.diameter_mm > 15:  # crossed by vessels, which hide the difference
                continue
            near = np.where(away < 0.75 * item.nodule.diameter_mm + 1, added, 0)
            inside = np.argwhere(near > 0.5 * np.percentile(near[near > 100], 80))
            center = ill.grid.to_world((inside.min(0) + inside.max(0)) / 2)
            edges = (np.ptp(inside, axis=0) + 1) * ill.grid.spacing_mm
            assert abs(edges.mean() - item.nodule.diameter_mm) < 1.5
            assert np.abs(center - item.nodule.center_lps_mm).max() < 1.5
            checked += 1
    assert checked >= 2


def test_weak_labels_lead_back_to_the_slice(phantoms):
    for phantom in phantoms:
        for label, item in zip(phantom.weak_labels, phantom.nodules, strict=True):
            assert label.slice_convention is SliceConvention.ONE_AT_HEAD
            k = phantom.grid.shape[2] - label.slice_number
            z = phantom.grid.to_world(np.array([0, 0, k]))[2]
            assert abs(z - item.nodule.center_lps_mm[2]) <= phantom.grid.spacing_mm[2] / 2 + 1e-6
            assert (label.lobe, label.series_uid) == (item.lobe, phantom.series_uid)
            assert abs(label.diameter_mm - item.nodule.diameter_mm) <= 0.5


def test_a_run_repeats_to_the_byte_whatever_its_length(written):
    folder, phantoms = written
    write_phantoms(folder / "again", count=1, seed=3)
    for name in (f"{phantoms[0].series_uid}.nii.gz", f"lobes/{phantoms[0].series_uid}.nii.gz"):
        again = (folder / "again" / name).read_bytes()
        assert again == (folder / "nifti" / name).read_bytes()
    assert not list((folder / "again").glob(f"{phantoms[1].series_uid}*"))


def test_nifti_and_dicom_hold_the_same_patient(written):
    folder, phantoms = written
    write_phantoms(folder / "dicom", count=1, seed=3, dicom=True)
    phantom = phantoms[0]
    file = folder / "nifti" / f"{phantom.series_uid}.nii.gz"
    folder = folder / "dicom" / phantom.series_uid
    for volume in (read_volume(file), read_volume(folder)):
        # The same patient point gives the same HU, however the voxels are ordered.
        index = np.random.default_rng(0).integers(phantom.grid.shape, size=(500, 3))
        there = np.rint(volume.grid.to_index(phantom.grid.to_world(index))).astype(int)
        assert np.array_equal(volume.hu[tuple(there.T)], phantom.hu[tuple(index.T)])
        np.testing.assert_allclose(
            np.sort(volume.grid.extent_lps_mm(), 0), phantom.grid.extent_lps_mm(), atol=1e-3
        )
    lobes = nib.load(file.parent / "lobes" / file.name)
    assert np.array_equal(np.asanyarray(lobes.dataobj), phantom.lobes)
    headers = [pydicom.dcmread(p) for p in sorted(folder.glob("*.dcm"))]
    assert [int(h.InstanceNumber) for h in headers] == list(range(1, phantom.grid.shape[2] + 1))
    z = [float(h.ImagePositionPatient[2]) for h in headers]
    assert z == sorted(z, reverse=True)  # 1 at the head
    assert len({h.SOPInstanceUID for h in headers}) == len(headers)
    assert {h.SeriesInstanceUID for h in headers} == {phantom.series_uid}
    assert {h.Modality for h in headers} == {"CT"} and headers[0].SOPInstanceUID.is_valid


def test_every_second_dicom_series_is_numbered_from_the_feet(tmp_path):
    write_phantoms(tmp_path, count=2, seed=3, dicom=True)
    truth = json.loads((tmp_path / "truth.json").read_text())["scans"]
    directions = []
    for scan in truth:
        headers = [pydicom.dcmread(p) for p in (tmp_path / scan["seriesuid"]).glob("*.dcm")]
        headers.sort(key=lambda header: int(header.InstanceNumber))
        z_mm = [float(header.ImagePositionPatient[2]) for header in headers]
        directions.append(set(np.sign(np.diff(z_mm))))
        assert read_volume(tmp_path / scan["seriesuid"]).hu.shape == tuple(scan["shape"])
    assert directions == [{-1}, {1}]


def test_tables_state_the_truth(written):
    folder, seen = written
    with open(folder / "nifti" / "annotations.csv", newline="") as table:
        rows = list(csv.reader(table))
    assert rows[0] == ["seriesuid", "coordX", "coordY", "coordZ", "diameter_mm"]
    stated = [item.nodule for scan in seen for item in scan.nodules]
    found = [tuple(map(float, row[1:])) for row in rows[1:]]
    np.testing.assert_allclose(found, [(*n.center_lps_mm, n.diameter_mm) for n in stated])
    with open(folder / "nifti" / "weak_labels.csv", newline="") as table:
        weak = list(csv.DictReader(table))
    assert ",".join(weak[0]) == (
        "seriesuid,lobe,slice_number,slice_convention,z_lps_mm,diameter_mm,attenuation,source"
    )
    labels = [label for scan in seen for label in scan.weak_labels]
    assert [(row["lobe"], int(row["slice_number"])) for row in weak] == [
        (label.lobe.value, label.slice_number) for label in labels
    ]
    truth = json.loads((folder / "nifti" / "truth.json").read_text())
    assert [scan["seriesuid"] for scan in truth["scans"]] == [scan.series_uid for scan in seen]
    assert make_phantom(truth["scans"][1]["seed"]).nodules == seen[1].nodules
