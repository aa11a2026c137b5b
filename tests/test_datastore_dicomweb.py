"""A PACS as datastore: labels are kept here whatever it says, and it gets SEGs of the nodules."""

from __future__ import annotations

import importlib
import sys
import tempfile
import time
from pathlib import Path

import highdicom as hd
import nibabel as nib
import numpy as np
import pytest
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from pacs import FakePacs
from series import AFFINE_LPS_MM, write_dicom

from deepem.dicom import nodule_seg, read_source
from deepem.geometry import RAS_TO_LPS, Grid
from deepem.markups import read_label, write_markups
from deepem.nodule import Nodule

APP = Path(__file__).parent.parent / "apps" / "deepem_app"
SHAPE = (40, 36, 16)
NODULE = Nodule((-86.0, -74.0, -280.0), 9.0)


@pytest.fixture
def modules(monkeypatch):
    for name in [name for name in sys.modules if name == "lib" or name.startswith("lib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(APP)
    return importlib.import_module("lib.datastore.dicomweb")


@pytest.fixture
def series(tmp_path) -> dict[str, Path]:
    """Two CTs as DICOM files."""
    hu = np.random.default_rng(1).integers(-1000, 100, SHAPE).astype(np.int16)
    folders = [tmp_path / "ct1", tmp_path / "ct2"]
    return {write_dicom(folder, hu, patient=f"P{at}"): folder for at, folder in enumerate(folders)}


@pytest.fixture
def pacs(series) -> FakePacs:
    return FakePacs(*series.values())


@pytest.fixture
def one(series) -> str:
    return next(iter(series))


@pytest.fixture
def two(series) -> str:
    return list(series)[1]


@pytest.fixture
def open_store(modules, pacs, tmp_path, monkeypatch):
    """One more store on the same cache, as another process opens it."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return lambda **options: modules.DicomWebStore(
        pacs, tmp_path / "cache", {"Modality": "CT"}, **options
    )


@pytest.fixture
def markups(tmp_path):
    def write(*nodules: Nodule) -> str:
        write_markups(tmp_path / "label.json", nodules)
        return str(tmp_path / "label.json")

    return write


def segs(pacs: FakePacs) -> list[hd.seg.Segmentation]:
    return [item for item in pacs.datasets if item.Modality == "SEG"]


def test_it_is_a_dicomweb_datastore_to_monai_label(open_store):
    assert isinstance(open_store(), DICOMWebDatastore)


def test_scans_are_those_of_the_pacs_with_what_it_says_of_them(open_store, pacs, one, two):
    store = open_store()
    assert store.list_images() == store.get_unlabeled_images() == [one, two]
    info = store.get_image_info(one)
    assert (info["PatientID"], info["Modality"], info["StudyDate"]) == ("P0", "CT", "UNK")
    store.update_image_info(one, {"reader": "R1"})
    assert open_store().get_image_info(one)["reader"] == "R1"
    assert open_store().get_image_info(one)["PatientID"] == "P0"
    assert store.status() == {"total": 2, "completed": 0, "label_tags": {}}


def test_a_final_label_with_boxes_is_kept_and_pushed_as_a_seg(open_store, pacs, markups, one, two):
    """MONAI Label's own datastore answers 500."""
    store = open_store()
    label = markups(NODULE)
    assert store.save_label(one, label, "final", {"label_info": []}) == one
    assert Path(store.get_label_uri(one, "final")).read_bytes() == Path(label).read_bytes()
    (seg,) = segs(pacs)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == one
    assert np.unique(seg.pixel_array).tolist() == [0, 1]
    info = store.get_label_info(one, "final")
    assert (info["seg"], info["SeriesInstanceUID"]) == ("pushed", seg.SeriesInstanceUID)
    assert store.get_labeled_images() == [one]
    assert store.get_unlabeled_images() == [two]  # at once, however long a list is remembered


@pytest.mark.parametrize("kind", ["boxes", "mask"])
def test_a_scan_without_nodules_is_labelled_and_the_pacs_gets_nothing(
    open_store, pacs, markups, tmp_path, one, kind
):
    label = markups()
    if kind == "mask":  # 500 in MONAI Label's own datastore
        label = str(tmp_path / "label.nii.gz")
        nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.uint8), RAS_TO_LPS @ AFFINE_LPS_MM), label)
    store = open_store()
    store.save_label(one, label, "final", {})
    assert store.get_labeled_images() == [one]
    assert read_label(Path(store.datalist()[0]["label"])) == ()
    assert store.get_label_info(one, "final")["seg"] == "none"
    assert segs(pacs) == []


def test_a_mask_with_a_nodule_is_pushed_too(open_store, pacs, tmp_path, one):
    mask = np.zeros(SHAPE, np.uint8)
    mask[10:20, 10:18, 4:8] = 1
    nib.save(nib.Nifti1Image(mask, RAS_TO_LPS @ AFFINE_LPS_MM), tmp_path / "label.nii.gz")
    open_store().save_label(one, str(tmp_path / "label.nii.gz"), "final", {})
    assert len(segs(pacs)) == 1


def test_what_the_pacs_refuses_is_kept_told_and_pushed_later(
    open_store, pacs, markups, one, two, caplog
):
    store = open_store()
    pacs.fails = {"store"}
    store.save_label(one, markups(NODULE), "final", {})
    info = store.get_label_info(one, "final")
    assert info["seg"] == "waiting"
    assert "no route to the PACS" in info["seg_error"]
    assert f"{one}: no SEG pushed: ConnectionError" in caplog.text
    assert store.get_labeled_images() == [one]
    assert read_label(Path(store.get_label_uri(one, "final")))

    pacs.fails = set()
    store = open_store()  # after a restart too
    store.save_label(two, markups(NODULE), "final", {})
    assert store.get_label_info(one, "final")["seg"] == "pushed"
    assert not store.get_label_info(one, "final")["seg_error"]
    pushed = {seg.ReferencedSeriesSequence[0].SeriesInstanceUID for seg in segs(pacs)}
    assert pushed == {one, two}


def test_a_refusal_in_an_answer_is_one(open_store, pacs, markups, one, monkeypatch):
    refused = hd.seg.Segmentation.__mro__[-2]()  # a plain dataset
    refused.FailedSOPSequence = [type(refused)()]
    monkeypatch.setattr(pacs, "store_instances", lambda datasets: refused)
    store = open_store()
    store.save_label(one, markups(NODULE), "final", {})
    assert store.get_label_info(one, "final")["seg"] == "waiting"


def test_a_label_that_is_no_markups_is_kept_and_not_tried_again(open_store, pacs, tmp_path, one):
    (tmp_path / "label.json").write_text("{")
    store = open_store()
    store.save_label(one, str(tmp_path / "label.json"), "final", {})
    info = store.get_label_info(one, "final")
    assert (info["seg"], "readable JSON" in info["seg_error"]) == ("none", True)


def test_findings_are_kept_here_only(open_store, pacs, markups, one):
    store = open_store()
    store.save_label(one, markups(NODULE), "original", {})
    assert store.get_labeled_images() == []
    assert "seg" not in store.get_label_info(one, "original")
    assert segs(pacs) == []


def test_nothing_is_deleted_because_the_pacs_has_no_seg(open_store, pacs, markups, one, two):
    store = open_store()
    store.save_label(one, markups(), "final", {})
    pacs.fails = {"store"}
    store.save_label(two, markups(NODULE), "final", {})
    pairs = {Path(pair["image"]).name: Path(pair["label"]) for pair in store.datalist()}
    assert sorted(pairs) == sorted([f"{one}.nii.gz", f"{two}.nii.gz"])
    assert read_label(pairs[f"{one}.nii.gz"]) == ()
    assert len(read_label(pairs[f"{two}.nii.gz"])) == 1


def test_labels_outlive_the_loss_of_the_index_and_of_the_cached_scans(
    open_store, markups, tmp_path, one, two
):
    open_store().save_label(one, markups(NODULE), "final", {})
    cache = tmp_path / "cache"
    (cache / "datastore_v2.json").unlink()
    for file in [*cache.glob("*.nii.gz")]:
        file.unlink()
    store = open_store()
    assert store.get_labeled_images() == [one]
    assert store.get_unlabeled_images() == [two]
    assert len(store.datalist()) == 1


def test_only_a_seg_of_nodules_makes_a_scan_labelled(open_store, pacs, series, one, two):
    """As another server pushed it, whose files are not here."""
    for uid, name in ((one, "Nodule"), (two, "Left lung")):
        seg = nodule_seg([NODULE], read_source(series[uid]))
        seg.SegmentSequence[0].SegmentLabel = name
        pacs.datasets.append(seg)
    store = open_store(read_only=True)
    assert store.get_labeled_images() == [one]
    (pair,) = store.datalist()
    assert Path(pair["image"]).name == f"{one}.nii.gz"
    (nodule,) = read_label(Path(pair["label"]))
    spacing_mm = Grid(AFFINE_LPS_MM, SHAPE).spacing_mm
    error_mm = np.abs(np.subtract(nodule.center_lps_mm, NODULE.center_lps_mm))
    assert (error_mm <= spacing_mm).all()
    assert abs(nodule.diameter_mm - NODULE.diameter_mm) < spacing_mm.max()


def test_one_seg_that_cannot_be_read_leaves_the_others(open_store, pacs, series, one, two, caplog):
    for uid in (one, two):
        pacs.datasets.append(nodule_seg([NODULE], read_source(series[uid])))
    pacs.datasets[-1].PixelData = b""
    assert [Path(pair["image"]).name for pair in open_store().datalist()] == [f"{one}.nii.gz"]
    assert f"{two}: its label is left out" in caplog.text


def test_a_scan_is_fetched_whole_or_not_at_all(open_store, pacs, tmp_path, one):
    store = open_store()
    pacs.fails = {"retrieve"}  # after half of its files
    with pytest.raises(HTTPException, match="no route to the PACS") as error:
        store.get_image_uri(one)
    assert error.value.status_code == 502
    pacs.fails = set()
    file = Path(store.get_image_uri(one))
    assert nib.load(file).shape == SHAPE
    assert len(list((tmp_path / "cache" / one).iterdir())) == SHAPE[2]
    asked = len(pacs.asked)
    assert store.get_image_uri(one) == str(file)
    assert len(pacs.asked) == asked
    assert list((tmp_path / "temporary").iterdir()) == []


def test_who_only_learns_fetches_scans_and_writes_no_index(open_store, tmp_path, markups, one, two):
    open_store().save_label(one, markups(NODULE), "final", {})
    before = (tmp_path / "cache" / "datastore_v2.json").read_bytes()
    learner = open_store(read_only=True)
    assert Path(learner.get_image_uri(two)).is_file()
    assert learner.get_image_info(two)["PatientID"] == "P1"
    assert len(learner.datalist()) == 1
    assert (tmp_path / "cache" / "datastore_v2.json").read_bytes() == before


@pytest.mark.parametrize("image", ["", "..", "../cache", "/etc/passwd", "1.2.3"])
def test_an_unknown_series_is_refused(open_store, pacs, markups, tmp_path, image):
    store = open_store()
    before = sorted(tmp_path.rglob("*"))
    label = markups(NODULE)
    for refused in (
        lambda: store.save_label(image, label, "final", {}),
        lambda: store.update_image_info(image, {}),
        lambda: store.get_image_info(image),
        lambda: store.remove_label(image, "final"),
    ):
        with pytest.raises(HTTPException, match="expected the id of a scan") as error:
            refused()
        assert error.value.status_code == 404
    assert store.get_image_uri(image) == store.get_label_uri(image, "final") == ""
    assert "retrieve" not in pacs.asked
    assert set(tmp_path.rglob("*")) - set(before) == {Path(label)}


def test_new_series_appear_and_a_silent_pacs_takes_nothing_away(
    open_store, pacs, series, modules, markups, one, two, monkeypatch
):
    everything = pacs.datasets
    pacs.datasets = [item for item in everything if item.SeriesInstanceUID == one]
    store = open_store()
    assert store.list_images() == [one]
    pacs.datasets = everything
    assert store.list_images() == [one]  # not asked again for a while
    monkeypatch.setattr(sys.modules["lib.datastore.pacs"], "FRESH_S", 0.0)
    assert store.list_images() == [one, two]
    store.save_label(one, markups(), "final", {})
    pacs.fails = {"search"}
    assert store.list_images() == [one, two]
    assert open_store().list_images() == [one]  # started meanwhile: what is known here
    assert open_store().get_labeled_images() == [one]


def test_the_app_starts_without_a_pacs_that_answers(modules, tmp_path, monkeypatch):
    """And without the internet, from which MONAI Label fetches a program at this point."""
    from monailabel.interfaces.utils.app import app_instance, clear_cache

    monkeypatch.setattr(settings, "MONAI_LABEL_DICOMWEB_CACHE_PATH", str(tmp_path))
    clear_cache()
    started = time.monotonic()
    try:
        app = app_instance(str(APP), "http://127.0.0.1:9/dicom-web/", {})
        assert app.info()["datastore"]["total"] == 0
        assert type(app.datastore()).__name__ == "DicomWebStore"
        with pytest.raises(HTTPException) as error:
            app.infer({"model": "nodule_detection", "image": "1.2.3"})
        assert error.value.status_code == 404
        assert time.monotonic() - started < 20  # the client would try for half a minute
    finally:
        clear_cache()
