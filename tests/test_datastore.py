"""The folder of scans and labels: nothing that was saved is lost, and no name leads out of it."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
from fastapi import HTTPException
from filelock import FileLock

APP = Path(__file__).parent.parent / "apps" / "deepem_app"
SCAN = "1.2.840"  # a dot in an id is no suffix
OTHER = "patient.nii.2"


@pytest.fixture
def open_store(monkeypatch, tmp_path):
    """Open one more store on the same folder, as another process does."""
    for name in [name for name in sys.modules if name == "lib" or name.startswith("lib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(APP)
    local = importlib.import_module("lib.datastore.local")
    studies = tmp_path / "studies"
    studies.mkdir()
    for image in (SCAN, OTHER):
        (studies / f"{image}.nii.gz").write_bytes(b"a scan")
    return lambda **options: local.LocalStore(studies, **options)


@pytest.fixture
def studies(tmp_path) -> Path:
    return tmp_path / "studies"


@pytest.fixture
def submit(tmp_path):
    """Save a label of this text as a client's file."""

    def save(store, text: str, image: str = SCAN, tag: str = "final", suffix: str = ".json"):
        file = tmp_path / f"submitted{suffix}"
        file.write_text(text)
        return store.save_label(image, str(file), tag, {"model": "m"})

    return save


def test_what_two_processes_write_is_there_for_both(open_store, submit):
    """MONAI Label's own writes its snapshot back: the second write undoes the first."""
    server, other = open_store(), open_store()
    submit(server, "a label")
    other.update_image_info(SCAN, {"PatientID": "P1"})
    submit(server, "findings", OTHER, "original")
    other.update_label_info(SCAN, "final", {"reader": "R1"})
    for store in (server, other, open_store()):
        assert store.get_labeled_images() == [SCAN]
        assert store.get_unlabeled_images() == [OTHER]
        assert store.get_image_info(SCAN)["PatientID"] == "P1"
        info = store.get_label_info(SCAN, "final")
        assert (info["model"], info["reader"], info["version"]) == ("m", "R1", 1)
        assert store.get_labels_by_image_id(OTHER) == {"original": OTHER}
        assert store.status()["completed"] == 1


def test_a_writer_waits_for_the_writer_of_another_process(open_store, submit):
    store = open_store()
    writer = threading.Thread(target=submit, args=(store, "a label"))
    with FileLock(store._lock_file):
        writer.start()
        writer.join(0.3)
        assert writer.is_alive() and store.get_labeled_images() == []
    writer.join(10)
    assert store.get_labeled_images() == [SCAN]


def test_a_save_that_breaks_off_leaves_the_earlier_label_whole(
    open_store, submit, tmp_path, monkeypatch
):
    store = open_store()
    submit(store, "the first label")

    whole = shutil.copyfile

    def full_disk(source, target, **options):
        if Path(source).parent != tmp_path:  # the earlier version is put away first
            return whole(source, target, **options)
        Path(target).write_text(Path(source).read_text()[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        submit(store, "the second label")
    label = Path(store.get_label_uri(SCAN, "final"))
    assert label.read_text() == "the first label"
    assert store.get_label_info(SCAN, "final")["version"] == 1


@pytest.mark.parametrize("harm", ["nothing", "delete", "corrupt", "empty"])
def test_json_labels_outlive_a_scan_and_the_loss_of_the_index(open_store, submit, studies, harm):
    submit(open_store(), "a label")
    index = studies / "datastore_v2.json"
    if harm == "delete":
        index.unlink()
    elif harm != "nothing":
        index.write_text('{"objects": {' if harm == "corrupt" else "")
    store = open_store()
    store.refresh()
    assert store.list_images() == [SCAN, OTHER]  # and not the index
    assert store.get_labeled_images() == [SCAN]
    assert Path(store.get_label_uri(SCAN, "final")).read_text() == "a label"
    assert SCAN in json.loads(index.read_text())["objects"]
    if harm == "corrupt":
        assert (studies / "datastore_v2.json.unreadable").read_text() == '{"objects": {'


def test_while_a_server_runs_the_loss_of_the_index_loses_nothing_at_all(
    open_store, submit, studies
):
    store = open_store()
    store.update_image_info(SCAN, {"PatientID": "P1"})
    (studies / "datastore_v2.json").unlink()
    submit(store, "a label")
    assert open_store().get_image_info(SCAN)["PatientID"] == "P1"
    (studies / "datastore_v2.json").write_text("{")
    submit(store, "a label", OTHER)
    assert open_store().get_labeled_images() == [SCAN, OTHER]
    assert open_store().get_image_info(SCAN)["PatientID"] == "P1"


def test_every_save_keeps_what_it_replaces(open_store, submit, studies):
    store = open_store()
    final = studies / "labels" / "final"
    submit(store, "one")
    submit(store, "two")
    assert store.get_label_info(SCAN, "final")["version"] == 2
    submit(store, "three", suffix=".nii.gz")
    assert not (final / f"{SCAN}.json").exists()  # else a scan would not know which one counts
    assert store.get_label_uri(SCAN, "final") == str(final / f"{SCAN}.nii.gz")
    store.remove_label(SCAN, "final")
    assert store.get_unlabeled_images() == [SCAN, OTHER]
    submit(store, "four")
    store.refresh()
    versions = {file.name: file.read_text() for file in (final / "versions" / SCAN).iterdir()}
    assert versions == {"0001.json": "one", "0002.json": "two", "0003.nii.gz": "three"}
    assert Path(store.get_label_uri(SCAN, "final")).read_text() == "four"
    assert store.get_label_info(SCAN, "final")["version"] == 4

    store.remove_image(SCAN)
    assert store.list_images() == [OTHER]
    assert (final / "versions" / SCAN / "0004.json").read_text() == "four"


def test_a_scan_finds_what_people_put_there_and_forgets_what_they_took(open_store, submit, studies):
    store = open_store()
    submit(store, "a label")
    info = store.get_label_info(SCAN, "final")
    (studies / "new.mha").write_bytes(b"a scan")
    (studies / "notes.csv").write_text("no scan")
    (studies / "labels" / "final" / "new.json").write_text("by hand")
    (studies / "labels" / "final" / "nobody.json").write_text("of no scan")
    (studies / f"{OTHER}.nii.gz").unlink()
    store.refresh()
    assert store.list_images() == [SCAN, "new"]
    assert store.get_labeled_images() == [SCAN, "new"]
    assert store.get_label_info(SCAN, "final") == info
    (studies / "labels" / "final" / "new.json").unlink()
    store.refresh()
    assert store.get_labeled_images() == [SCAN]


def test_a_file_that_is_only_half_written_is_no_scan_and_an_old_one_goes(open_store, studies):
    leftover = studies / f".0123abcd.{SCAN}.nii.gz"
    fresh = studies / ".4567cdef.new.nii.gz"
    for file in (leftover, fresh):
        file.write_bytes(b"half a ")
    os.utime(leftover, (0, 0))
    assert open_store().list_images() == [SCAN, OTHER]
    assert not leftover.exists()
    assert fresh.exists()  # somebody may be writing it


def test_half_an_earlier_version_of_a_killed_save_goes_and_whole_ones_stay(
    open_store, submit, studies
):
    store = open_store()
    submit(store, "one")
    submit(store, "two")
    versions = studies / "labels" / "final" / "versions" / SCAN
    leftover, fresh = versions / ".0123abcd.0002.json", versions / ".4567cdef.0002.json"
    for file in (leftover, fresh):
        file.write_text("half a ")
    for file in (leftover, versions / "0001.json"):
        os.utime(file, (0, 0))
    store.refresh()
    assert {file.name for file in versions.iterdir()} == {"0001.json", fresh.name}
    assert (versions / "0001.json").read_text() == "one"


def test_who_only_learns_sees_everything_and_writes_nothing(open_store, submit, studies):
    server, learner = open_store(), open_store(read_only=True)
    submit(server, "a label")
    (studies / "new.nii").write_bytes(b"a scan")
    before = (studies / "datastore_v2.json").read_bytes()
    (pair,) = learner.datalist()
    assert Path(pair["label"]).read_text() == "a label"
    learner.refresh()
    with pytest.raises(PermissionError):
        learner.update_image_info(SCAN, {"strategy": "mine"})
    with pytest.raises(PermissionError):
        submit(learner, "mine")
    assert (studies / "datastore_v2.json").read_bytes() == before


BAD_IDS = ["", ".", "..", "../studies/1.2.840", "/etc/passwd", "nobody", "1.2.840.nii.gz"]


@pytest.mark.parametrize("image", BAD_IDS)
def test_an_id_of_no_scan_is_refused_wherever_it_is_given(open_store, submit, studies, image):
    store = open_store()
    before = sorted(studies.rglob("*"))
    for refused in (
        lambda: submit(store, "a label", image),
        lambda: store.update_image_info(image, {}),
        lambda: store.update_label_info(image, "final", {}),
        lambda: store.get_image_info(image),
        lambda: store.get_label_info(image, "final"),
        lambda: store.remove_image(image),
        lambda: store.remove_label(image, "final"),
    ):
        with pytest.raises(
            HTTPException, match="expected the id of a scan on this server"
        ) as error:
            refused()
        assert error.value.status_code == 404
    assert store.get_image_uri(image) == store.get_label_uri(image, "final") == ""
    assert sorted(studies.rglob("*")) == before


BAD_NAMES = ["..", "../x", "/tmp/x", "a/b", "a\\b", "c:", ".hidden", "a\0b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_a_path_is_refused(open_store, submit, studies, name):
    store = open_store()
    before = sorted(studies.parent.rglob("*"))
    with pytest.raises(HTTPException, match="label tag: expected a name that is no path") as error:
        submit(store, "a label", tag=name)
    assert error.value.status_code == 422
    with pytest.raises(HTTPException, match="image id: expected a name that is no path"):
        store.add_image(name, str(studies / f"{SCAN}.nii.gz"), {})
    with pytest.raises(HTTPException, match="label: expected one of") as error:
        store.remove_label(SCAN, name)
    assert error.value.status_code == 404
    assert store.get_label_uri(SCAN, name) == ""
    assert {path.name for path in studies.parent.rglob("*")} - {p.name for p in before} == {
        "submitted.json"
    }


def test_a_file_of_another_kind_is_neither_scan_nor_label(open_store, submit, tmp_path):
    store = open_store()
    with pytest.raises(HTTPException, match="label: expected one of"):
        submit(store, "a label", suffix=".txt")
    with pytest.raises(HTTPException, match="image: expected one of"):
        store.add_image("new", str(tmp_path / "submitted.txt"), {})
    assert store.get_labeled_images() == []


def test_an_image_that_is_sent_again_keeps_its_labels(open_store, submit, studies, tmp_path):
    store = open_store()
    submit(store, "a label")
    (tmp_path / "sent.mha").write_bytes(b"the same scan")
    assert store.add_image(SCAN, str(tmp_path / "sent.mha"), {"PatientID": "P1"}) == SCAN
    store.refresh()
    assert Path(store.get_image_uri(SCAN)).read_bytes() == b"the same scan"
    assert not (studies / f"{SCAN}.nii.gz").exists()
    assert store.get_labeled_images() == [SCAN]
    assert store.get_image_info(SCAN)["PatientID"] == "P1"
    assert store.add_image(None, str(tmp_path / "sent.mha"), None) == "sent"


def test_a_name_of_the_datastore_is_kept(open_store):
    open_store().set_name("ours")
    open_store().set_description("chests")
    assert (open_store().name(), open_store().description()) == ("ours", "chests")


def test_a_copied_scan_is_seen_by_a_running_server(open_store, studies):
    from serving import wait_for

    store = open_store(auto_reload=True)
    try:
        (studies / ".part").write_bytes(b"a scan")
        (studies / ".part").rename(studies / "late.nii.gz")
        wait_for(lambda: "late" in store.list_images(), 20, "the new scan")
    finally:
        store._observer.stop()
        store._observer.join()
