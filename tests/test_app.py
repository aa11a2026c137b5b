"""The MONAI Label app in this process, loaded as MONAI Label loads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
import requests
import torch
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMWebDatastore
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.utils.app import app_instance, clear_cache

import deepem
from deepem.em import EmConfig
from deepem.errors import InputError
from deepem.fit import Progress, TrainConfig
from deepem.geometry import RAS_TO_LPS, Grid
from deepem.markups import read_markups, write_markups
from deepem.masks import nodule_mask
from deepem.model import ModelCard, fingerprint, publish
from deepem.network import PRESETS, NoduleNet
from deepem.nodule import Lobe, Nodule, Proposal, SliceConvention, WeakLabel
from deepem.phantom import make_phantom
from deepem.phantom.write import write_dicom_series
from deepem.ranking.strategies import DEFAULT, STRATEGIES
from deepem.tables import write_weak_labels
from deepem.training import TrainResult
from deepem.volume import read_image, read_volume
from deepem.weak_labels import Records

APP = Path(__file__).parent.parent / "apps" / "deepem_app"
MODEL, MASK = "nodule_detection", "nodule_mask"
AS_OHIF = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}


def publish_random_weights(path: Path, seed: int = 0) -> str:
    """A detector that finds nodules anywhere; returns the fingerprint of its weights."""
    torch.manual_seed(seed)
    network = NoduleNet(PRESETS["slim"])
    torch.nn.init.zeros_(network.head[-1].bias)  # scores around one half
    weights = network.state_dict()
    card = ModelCard(
        network=PRESETS["slim"],
        training={},
        data={},
        data_fingerprint="",
        metrics={"cpm": 0.0},
        history=[],
        weights_fingerprint=fingerprint(weights),
        created_utc="2000-01-01T00:00:00+00:00",
        deepem_version=deepem.__version__,
    )
    publish(weights, card, path)
    return card.weights_fingerprint


@pytest.fixture(scope="module")
def ct(tmp_path_factory) -> Path:
    """A scan without nodules."""
    phantom = make_phantom(3, nodule_count=0)
    path = tmp_path_factory.mktemp("ct") / "ct.nii"
    nib.save(nib.Nifti1Image(phantom.hu, RAS_TO_LPS @ phantom.grid.affine_lps_mm), path)
    return path


@pytest.fixture
def app_dir(tmp_path) -> Path:
    """A copy of the app without any model."""
    ignore = shutil.ignore_patterns("*.pt", "*.json", "__pycache__", "bin", "logs", MODEL)
    return shutil.copytree(APP, tmp_path / "app", ignore=ignore)


@pytest.fixture
def studies(tmp_path, ct) -> Path:
    folder = tmp_path / "studies"
    folder.mkdir()
    shutil.copy(ct, folder / "patient1.nii")
    (folder / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    return folder


@pytest.fixture
def load(app_dir, studies, monkeypatch):
    """Load the app through MONAI Label's own loader."""
    monkeypatch.setattr(settings, "MONAI_LABEL_DATASTORE_AUTO_RELOAD", False)  # leaves no threads

    def load_app(**conf: str):
        clear_cache()
        return app_instance(str(app_dir), str(studies), conf)

    yield load_app
    clear_cache()


def test_info_is_what_slicer_accepts(load):
    info = load().info()
    assert not info.get("config")  # Slicer refuses a server that has one
    assert info["labels"] == ["nodule"]  # a list, as OHIF needs; Slicer only goes through it
    assert list(info["models"]) == [MODEL, MASK]  # Slicer preselects the first
    model = info["models"][MODEL]
    assert (model["type"], model["labels"], model["dimension"]) == ("detection", {"nodule": 1}, 3)
    mask = info["models"][MASK]
    assert (mask["type"], mask["labels"]["nodule"], mask["dimension"]) == ("segmentation", 1, 3)
    assert sorted(mask["labels"].values()) == [1, 2, 3, 4]
    assert list(info["trainers"]) == [MODEL]  # OHIF starts all there are
    assert list(info["strategies"])[0] == DEFAULT  # Slicer preselects the first
    assert set(info["strategies"]) == {*STRATEGIES, "random", "first"}
    assert info["datastore"]["total"] == 1  # the table beside the scan is no scan
    for task in (model, mask, info["trainers"][MODEL]):
        for value in task["config"].values():
            choices = value if isinstance(value, list) else []
            assert isinstance(value, (int, float, list))
            assert all(isinstance(choice, str) for choice in choices)
    json.dumps(info)


def test_a_started_server_answers_in_threads(load, monkeypatch):
    from monailabel.app import app as server

    app = load(skip_scoring="true")
    monkeypatch.setattr(MONAILabelApp, "on_init_complete", lambda self: None)  # leaves no threads
    monkeypatch.setenv("MONAI_LABEL_DATASTORE_READ_ONLY", "")
    monkeypatch.setattr(server, "middleware_stack", server.build_middleware_stack())
    app.on_init_complete()
    assert isinstance(server.middleware_stack, sys.modules["lib.threads"].InThreads)


def test_the_threshold_of_the_conf_is_the_first_choice(load):
    choices = load(score_threshold="0.25").info()["models"][MODEL]["config"]["score_threshold"]
    assert choices[0] == "0.25"
    assert len(choices) == len(set(choices)) > 3


@pytest.mark.parametrize(
    ("conf", "message"),
    [
        ({"score_treshold": "0.3"}, r"--conf: key: expected one of .*'score_threshold'.*score_tre"),
        ({"score_threshold": "high"}, "score_threshold: expected a number, got high"),
        ({"score_threshold": "1.5"}, r"score_threshold: expected a number in 0\.\.1, got 1.5"),
        ({"score_threshold": "nan"}, "score_threshold: expected a number"),
        ({"preload": "maybe"}, "preload: expected true or false, got maybe"),
        ({"device": "tpu"}, "device: expected one of .*, got tpu"),
        ({"models": "lungs"}, "models: expected all, or some of .*nodule_detection.*, got lungs"),
        ({"strategy": "random"}, "strategy: expected one of shuffle, .*, got random"),
        ({"em_method": "best"}, "em_method: expected one of none, map, sampling, soft, got best"),
        ({"train_steps": "1.5"}, "train_steps: expected a whole number, got 1.5"),
        ({"train_minutes": "-1"}, "train_minutes: expected a number, 0 or more, got -1"),
        ({"records": "/no/where"}, "records: expected an existing file or folder, got /no/where"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(load, conf, message):
    with pytest.raises(InputError, match=message):
        load(**conf)


def test_settings_of_monai_label_pass(load):
    app = load(models=MODEL, server_mode="false", skip_scoring="true", skip_trainers="TRUE")
    assert app.info()["trainers"] == {}


def test_without_a_model_the_app_starts_and_says_so(load):
    app = load(preload="true")
    assert MODEL in app.info()["models"]
    with pytest.raises(HTTPException, match="there is no model yet") as caught:
        app.infer({"model": MODEL, "image": "patient1"})
    assert caught.value.status_code == 503


def test_the_shipped_model_can_be_hidden(load, app_dir):
    publish_random_weights(app_dir / "model" / f"pretrained_{MODEL}.pt")
    assert load().model_file(MODEL).endswith(f"pretrained_{MODEL}.pt")
    assert load(use_pretrained_model="false").model_file(MODEL) is None


def test_a_model_file_that_is_none_is_named(load, app_dir):
    (app_dir / "model" / f"{MODEL}.pt").write_bytes(b"no model")
    with pytest.raises(HTTPException, match=rf"{MODEL}.pt: model: expected") as caught:
        load().infer({"model": MODEL, "image": "patient1"})
    assert caught.value.status_code == 503


@pytest.mark.parametrize("threshold", ["0", ["0", "0.5"], 0])
def test_findings_are_the_same_in_the_markups_and_in_the_answer(load, app_dir, threshold):
    publish_random_weights(app_dir / "model" / f"{MODEL}.pt")
    request = {"model": MODEL, "image": "patient1", "score_threshold": threshold}
    result = load().infer(request)
    found = result["params"]["nodules"]
    scores = [nodule["probability"] for nodule in found]
    assert found
    assert scores == sorted(scores, reverse=True)
    markups = read_markups(Path(result["file"]))
    assert [nodule.center_lps_mm for nodule in markups] == [
        pytest.approx(nodule["center_lps_mm"]) for nodule in found
    ]
    assert [nodule.diameter_mm for nodule in markups] == [
        pytest.approx(nodule["diameter_mm"]) for nodule in found
    ]
    os.unlink(result["file"])


@pytest.fixture
def truthful(load, app_dir, monkeypatch):
    """The app with a detector that finds exactly what is there; set its ``findings``."""
    publish_random_weights(app_dir / "model" / f"{MODEL}.pt")
    app = load()
    app.findings = []
    monkeypatch.setattr(
        deepem.detector.Detector,
        "propose",
        lambda self, scan: app.findings,
    )
    return app


def read_mask(result) -> tuple[np.ndarray, Grid]:
    """The voxels of the file that came back, and their grid; the file is removed."""
    voxels, affine = read_image(Path(result["file"]))
    os.unlink(result["file"])
    return voxels, Grid(affine, voxels.shape)


def test_the_mask_shows_the_findings_on_the_voxels_of_the_ct(load, app_dir, ct, monkeypatch):
    publish_random_weights(app_dir / "model" / f"{MODEL}.pt")
    app = load(score_threshold="0.55")
    module, looks = sys.modules["lib.served"], []
    prepare = module.prepare
    monkeypatch.setattr(module, "prepare", lambda volume: looks.append(1) or prepare(volume))
    boxes = app.infer({"model": MODEL, "image": "patient1"})
    os.unlink(boxes["file"])
    result = app.infer({"model": MASK, "image": "patient1", **AS_OHIF})
    header = Path(result["file"]).read_bytes()[:600]
    assert header.startswith(b"NRRD") and b"encoding: raw" in header and b"unsigned char" in header
    mask, grid = read_mask(result)
    volume = read_volume(ct)
    assert mask.shape == volume.hu.shape and mask.dtype == np.uint8
    np.testing.assert_allclose(grid.affine_lps_mm, volume.grid.affine_lps_mm, atol=1e-6)
    found = result["params"]["nodules"]
    assert found == boxes["params"]["nodules"] and len(looks) == 1  # looked at once
    assert result["params"]["label_names"] == {"nodule": 1}
    for nodule in found:
        at = np.rint(grid.to_index(np.array(nodule["center_lps_mm"]))).astype(int)
        if ((at >= 0) & (at < mask.shape)).all():
            assert mask[tuple(at)] == 1
    nodules = [Nodule(tuple(one["center_lps_mm"]), one["diameter_mm"]) for one in found]
    np.testing.assert_array_equal(mask, nodule_mask(nodules, volume.grid))


def test_a_changed_scan_is_looked_at_again(truthful, studies):
    app = truthful
    first = app.infer({"model": MASK, "image": "patient1"})
    image = nib.load(studies / "patient1.nii")
    half = image.slicer[:, :, : image.shape[2] // 2]
    nib.save(nib.Nifti1Image(np.array(half.dataobj), half.affine), studies / "patient1.nii")
    second = app.infer({"model": MASK, "image": "patient1"})
    assert read_mask(first)[1].shape[2] == 2 * read_mask(second)[1].shape[2]


def test_confidence_bands_on_request(truthful, ct):
    grid = read_volume(ct).grid
    low, high = grid.extent_lps_mm()
    truthful.findings = [
        Proposal(Nodule(tuple(low + share * (high - low)), 9), logit)
        for share, logit in ((0.3, 4.0), (0.6, 0.1))  # p 0.98 and 0.52
    ]
    request = {"model": MASK, "image": "patient1", "confidence_bands": True}
    result = truthful.infer(request)
    assert result["file"].endswith(".nii.gz")
    names = result["params"]["label_names"]
    assert names == {"nodule p>=0.9": 2, "nodule p<0.7": 4}  # only what is there, for Slicer
    assert names.items() <= truthful.info()["models"][MASK]["labels"].items()  # for OHIF
    mask, grid = read_mask(result)
    assert set(np.unique(mask)) == {0, 2, 4}
    at = np.rint(grid.to_index(np.array(truthful.findings[1].nodule.center_lps_mm))).astype(int)
    assert mask[tuple(at)] == 4


def test_a_mask_of_nothing_is_a_mask(truthful):
    result = truthful.infer({"model": MASK, "image": "patient1", **AS_OHIF})
    assert not read_mask(result)[0].any()
    assert result["params"]["label_names"] == {"nodule": 1}


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"result_extension": ".png"}, r"result_extension: expected one of .nii.gz, .*, got .png"),
        ({"confidence_bands": "many"}, "confidence_bands: expected true or false, got many"),
        ({"store_sr": True}, "store_sr: expected true only for a scan of a PACS"),
    ],
)
def test_a_mask_that_cannot_be_is_refused(truthful, settings_, message):
    with pytest.raises(HTTPException, match=message) as caught:
        truthful.infer({"model": MASK, "image": "patient1", **settings_})
    assert caught.value.status_code == 422


def test_models_keep_their_order_and_only_one_has_a_trainer(load):
    assert list(load(models=f"{MASK}, {MODEL}").info()["models"]) == [MODEL, MASK]
    info = load(models=MASK).info()
    assert info["trainers"] == info["strategies"] == info["scoring"] == {}


def test_above_the_threshold_nothing_is_found_and_the_file_is_still_markups(load, app_dir):
    publish_random_weights(app_dir / "model" / f"{MODEL}.pt")
    result = load(score_threshold="1").infer({"model": MODEL, "image": "patient1"})
    assert result["params"]["nodules"] == []
    (markup,) = json.loads(Path(result["file"]).read_text())["markups"]
    assert (markup["type"], markup["controlPoints"]) == ("Fiducial", [])
    os.unlink(result["file"])


def test_a_wrong_threshold_in_a_request_is_refused(load, app_dir):
    publish_random_weights(app_dir / "model" / f"{MODEL}.pt")
    with pytest.raises(HTTPException, match="score_threshold: expected a number") as caught:
        load().infer({"model": MODEL, "image": "patient1", "score_threshold": "high"})
    assert caught.value.status_code == 422


def test_a_newly_published_model_is_served_at_once(load, app_dir):
    path = app_dir / "model" / f"{MODEL}.pt"
    shipped = publish_random_weights(app_dir / "model" / f"pretrained_{MODEL}.pt", seed=1)
    app = load(score_threshold="1")
    request = {"model": MODEL, "image": "patient1"}
    assert app.infer(request)["params"]["model"] == shipped
    for seed in (2, 3):
        trained = publish_random_weights(path, seed=seed)
        os.utime(path, ns=(time.time_ns(), time.time_ns() + seed))
        assert app.infer(request)["params"]["model"] == trained


@pytest.mark.parametrize("image", ["patient2", "", "../studies/patient1", ".", None, ["patient1"]])
def test_an_unknown_image_is_refused(load, image):
    with pytest.raises(HTTPException, match="expected the id of a scan on this server") as caught:
        load().infer({"model": MODEL, "image": image})
    assert caught.value.status_code == 404


def test_a_path_is_no_image_id(load, studies, monkeypatch):
    app = load()
    monkeypatch.chdir(studies)
    for image in (str(studies / "patient1.nii"), "patient1.nii", str(studies)):
        with pytest.raises(HTTPException) as caught:
            app.infer({"model": MODEL, "image": image})
        assert caught.value.status_code == 404


def test_a_file_in_the_working_directory_does_not_stand_in_for_a_scan(
    load, app_dir, tmp_path, monkeypatch
):
    publish_random_weights(app_dir / "model" / f"{MODEL}.pt")
    app = load()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "patient1").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = app.infer({"model": MODEL, "image": "patient1", "score_threshold": 1})
    assert result["params"]["nodules"] == []
    os.unlink(result["file"])


def test_a_corrupt_scan_is_refused_with_the_reason(load, app_dir, studies):
    publish_random_weights(app_dir / "model" / f"{MODEL}.pt")
    (studies / "broken.nii.gz").write_bytes(b"no image")
    with pytest.raises(HTTPException, match=r"broken.nii.gz: file: expected") as caught:
        load().infer({"model": MODEL, "image": "broken"})
    assert caught.value.status_code == 422


def test_findings_can_be_saved_as_a_label(load, app_dir, studies):
    publish_random_weights(app_dir / "model" / f"{MODEL}.pt")
    app = load(score_threshold="0")
    result = app.infer({"model": MODEL, "image": "patient1", "save_label": True})
    assert (studies / "labels" / "original" / "patient1.json").is_file()
    assert app.datastore().get_unlabeled_images() == ["patient1"]  # no reader has seen it
    os.unlink(result["file"])


def test_only_scans_without_a_final_label_are_offered(load, studies, ct):
    shutil.copy(ct, studies / "patient2.nii")
    app = load()
    label = studies.parent / "label.json"
    label.write_text('{"markups": []}')
    app.datastore().save_label("patient1", str(label), "final", {})
    for strategy in ("first", "random"):
        assert app.next_sample({"strategy": strategy})["id"] == "patient2"
    app.datastore().save_label("patient2", str(label), "final", {})
    assert app.next_sample({"strategy": "first"}) == {}


def test_training_without_enough_labels_says_what_is_missing(load, studies, ct, caplog):
    shutil.copy(ct, studies / "patient2.nii")
    app = load()
    label = studies.parent / "label.json"
    label.write_text("{")
    app.datastore().save_label("patient1", str(label), "final", {})
    label.write_text('{"markups": []}')
    app.datastore().save_label("patient2", str(label), "final", {})
    with pytest.raises(ValueError, match="expected nodules in scans of at least 2 patients"):
        app.train({"model": MODEL, "steps": 1})
    assert "patient1.json: file: expected readable JSON" in caplog.text
    stats = app.info()["train_stats"][MODEL]
    assert stats["message"].startswith("failed: labels: expected nodules in scans")
    assert stats["total_epochs"] > 0
    assert not (Path(app.app_dir) / "model" / f"{MODEL}.pt").exists()


def test_scans_of_one_patient_are_not_split(load, studies, ct):
    shutil.copy(ct, studies / "patient2.nii")
    app = load()
    label = studies.parent / "label.json"
    write_markups(label, [Nodule((0, 0, 0), 8)])
    for image in ("patient1", "patient2"):
        app.datastore().save_label(image, str(label), "final", {})
        app.datastore().update_image_info(image, {"PatientID": "the same"})
    with pytest.raises(ValueError, match=r"at least 2 patients .*, got 1 of 1"):
        app.train({"model": MODEL, "steps": 1})


def test_a_first_model_that_finds_nothing_is_not_published(load, studies, ct):
    shutil.copy(ct, studies / "patient2.nii")
    app = load()
    label = studies.parent / "label.json"
    write_markups(label, [Nodule((0, 0, 0), 8)])
    for image in ("patient1", "patient2"):
        app.datastore().save_label(image, str(label), "final", {})
    stats = app.train({"model": MODEL, "steps": "1", "device": ["cpu", "auto"]})
    assert stats == app.info()["train_stats"][MODEL]
    assert stats["message"].startswith("not published: CPM 0.000 on 1 validation scans")
    assert app.model_file(MODEL) is None


def test_a_training_process_leaves_the_datastore_as_the_server_wrote_it(
    load, app_dir, studies, ct, monkeypatch
):
    monkeypatch.setenv("MONAI_LABEL_DATASTORE_READ_ONLY", "false")  # put back after the test
    load().on_init_complete()  # what the server does before it starts any process
    datastore = (studies / "datastore_v2.json").read_bytes()
    shutil.copy(ct, studies / "patient2.nii")  # what the process would like to write down
    command = [sys.executable, "-m", "monailabel.interfaces.utils.app", "-m", "train"]
    command += ["--app", str(app_dir), "--studies", str(studies)]
    command += ["--request", json.dumps({"model": MODEL})]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ended.returncode
    assert (
        ended.stderr.strip()
        .splitlines()[-1]
        .startswith("ValueError: labels: expected nodules in scans of at least 2 patients")
    )
    assert (studies / "datastore_v2.json").read_bytes() == datastore


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"steps": "many"}, "steps: expected a number"),
        ({"minutes": -1}, "minutes: expected a number, 0 or more"),
        ({"method": "best"}, "method: expected one of map, none, sampling, soft, got best"),
        ({"rounds": 1.5}, "rounds: expected a whole number, got 1.5"),
        ({"rounds": 0}, "rounds: expected 1 or more, got 0"),
        ({"device": "tpu"}, "device: expected one of auto, cpu, cuda, got tpu"),
    ],
)
def test_training_refuses_a_wrong_setting(load, request_, message):
    app = load()
    with pytest.raises(ValueError, match=message):
        app.train({"model": MODEL, **request_})
    assert "failed" in app.info()["train_stats"][MODEL]["message"]


# --- EM on records beside the scans: what the app hands to the library, and what it says


@dataclass
class Lesson:
    """What a training was called with, the last of its progress, and what it left."""

    config: TrainConfig
    weak: dict[str, tuple[WeakLabel, ...]]
    labelled: list[str]
    init: Path | None
    running: dict
    stats: dict


@pytest.fixture
def lesson(load, monkeypatch):
    """Train with the library's `train` in name only."""

    def learn(request: dict | None = None, **conf: str) -> Lesson:
        app = load(**conf)
        called = {}

        def train(config, labelled, out, *, weak, init, served, publish_to, on_progress):
            stage = "e-step 2 of 4, scan 17 of 60"
            on_progress(Progress(stage, 30, 100, 1, 4, 60.0, 140.0, 0.5, 0.25))
            called["running"] = app.info()["train_stats"][MODEL]
            called["weak"] = {item.study.series_uid: item.labels for item in weak}
            called["labelled"] = [item.study.series_uid for item in labelled]
            called["init"], called["config"] = init, config
            return TrainResult(True, "published: CPM 0.5", 0.5, None, [], ["one unreadable scan"])

        monkeypatch.setattr(sys.modules["lib.trainers.nodule_detection"], "train", train)
        stats = app.train({"model": MODEL, **(request or {})})
        assert stats == app.info()["train_stats"][MODEL]
        return Lesson(stats=stats, **called)

    return learn


ROW = "seriesuid,lobe,slice_number,slice_convention,z_lps_mm,diameter_mm,attenuation,source\n"


def write_records(folder: Path, *rows: str) -> None:
    (folder / "weak_labels.csv").write_text(ROW + "".join(row + "\n" for row in rows))


def test_records_beside_the_scans_are_learned_from_without_any_label(lesson, app_dir, studies, ct):
    shutil.copy(ct, studies / "patient2.nii")
    model = app_dir / "model" / f"{MODEL}.pt"
    publish_random_weights(model)
    write_records(studies, "patient1,RUL,,,-50,8,solid,reader")
    (studies / "reports").mkdir()
    report = "FINDINGS: There is a 6 mm solid nodule in the left lower lobe.\n"
    (studies / "reports" / "patient2.txt").write_text(report)
    learned = lesson()
    assert learned.config.em == EmConfig()
    assert learned.labelled == []
    assert learned.init == model
    (table,), (text,) = learned.weak["patient1"], learned.weak["patient2"]
    assert (table.lobe, table.z_lps_mm, table.diameter_mm) == (Lobe.RUL, -50, 8)
    assert (text.lobe, text.z_lps_mm, text.diameter_mm) == (Lobe.LLL, None, 6)
    assert learned.running["message"].startswith("e-step 2 of 4, scan 17 of 60: step 30 of 100")
    assert (learned.running["epoch"], learned.running["best_metric"]) == (1, 0.25)
    report = app_dir / "model" / MODEL / "report.html"
    assert learned.stats["message"] == (
        f"published: CPM 0.5; EM (map) on the records of 2 scans; report: {report}"
    )
    page = report.read_text()
    assert "published: CPM 0.5" in page
    assert "one unreadable scan" in page


def test_what_is_marked_is_not_taught_from_its_record(lesson, load, studies, ct, tmp_path):
    shutil.copy(ct, studies / "patient2.nii")
    label = tmp_path / "label.json"
    write_markups(label, [Nodule((0, 0, 0), 8)])
    load().datastore().save_label("patient1", str(label), "final", {})
    write_records(studies, "patient1,RUL,,,-50,,,", "patient2,RUL,,,-50,,,")
    learned = lesson()
    assert (learned.labelled, list(learned.weak)) == (["patient1"], ["patient2"])

    write_records(studies, "patient1,RUL,,,-50,,,")
    learned = lesson()
    assert (learned.labelled, learned.weak, learned.config.em) == (["patient1"], {}, None)
    assert "marked scans only: no usable records of other scans in" in learned.stats["message"]


def test_records_know_the_patients_of_the_datastore(load, studies):
    app = load()
    app.datastore().update_image_info("patient1", {"PatientID": "somebody"})
    recorded = sys.modules["lib.trainers.nodule_detection"].recorded_studies
    (weak,), _ = recorded(app.datastore(), Records((WeakLabel("patient1", Lobe.RUL),)))
    assert weak.study.patient_id == "somebody"


def test_the_request_chooses_method_rounds_and_length(lesson, studies):
    write_records(studies, "patient1,RUL,,,-50,,,")
    wanted = {"method": ["sampling", "soft"], "rounds": "2", "minutes": 0.5, "seed": 3}
    config = lesson(wanted).config
    assert config == TrainConfig(
        steps=None, minutes=0.5, seed=3, em=EmConfig(method="sampling", rounds=2)
    )


def test_the_conf_has_the_defaults_of_a_request(lesson, load, studies):
    write_records(studies, "patient1,RUL,,,-50,,,")
    conf = {"em_method": "map", "train_steps": "70", "train_minutes": "1.5"}
    offered = load(**conf).info()["trainers"][MODEL]["config"]
    assert offered["method"] == ["map", "none", "sampling", "soft"]
    assert (offered["steps"], offered["minutes"], offered["rounds"]) == (70, 1.5, EmConfig.rounds)
    config = lesson(**conf).config
    assert (config.em.method, config.steps, config.minutes) == ("map", None, 1.5)
    config = lesson({"steps": 9}, **conf).config
    assert (config.steps, config.minutes) == (9, None)
    config = lesson({"minutes": 0}, **conf).config
    assert (config.steps, config.minutes) == (70, None)


@pytest.mark.parametrize("by", ["request", "conf"])
def test_method_none_does_not_even_read_the_records(lesson, studies, by):
    (studies / "weak_labels.csv").write_text("no table")
    learned = lesson({"method": "none"}) if by == "request" else lesson(em_method="none")
    assert (learned.config.em, learned.weak) == (None, {})
    assert "marked scans only, as asked" in learned.stats["message"]


def test_without_records_there_is_no_em_and_the_message_says_so(lesson, studies, caplog):
    caplog.set_level("INFO")
    learned = lesson()
    assert (learned.config.em, learned.weak) == (None, {})
    said = f"marked scans only: no usable records of other scans in {studies}"
    assert said in learned.stats["message"]
    assert said in caplog.text


def test_every_record_that_cannot_be_used_is_named_and_all_are_counted(
    lesson, app_dir, studies, ct, caplog
):
    shutil.copy(ct, studies / "patient2.nii")
    (studies / "gone.nii").touch()
    write_records(
        studies,
        "patient1,RUL,,,-50,,,",
        "patient1,RXL,,,-50,,,",
        "nobody,RUL,,,-50,,,",
        "patient2,RUL,9999,one_at_head,,,,",
        "gone,RUL,,,-50,,,",
    )
    learned = lesson()
    assert list(learned.weak) == ["patient1"]
    table = studies / "weak_labels.csv"
    reasons = [
        f"{table}, row 3: lobe: expected one of",
        f"{table}, row 4: seriesuid: expected a scan that is there, got nobody",
        f"{table}, row 5: slice_number: expected 1 to",
        "gone.nii: file: expected a readable NIfTI",
    ]
    page = (app_dir / "model" / MODEL / "report.html").read_text()
    for reason in reasons:
        assert f"not used: {reason}" in caplog.text.replace(str(studies / "gone"), "gone")
        assert reason in page.replace(str(studies / "gone"), "gone")
    assert "EM (map) on the records of 1 scans, 5 records not used" in learned.stats["message"]


def test_records_of_which_none_is_usable_are_no_em(lesson, studies):
    write_records(studies, "nobody,RUL,,,-50,,,")
    learned = lesson()
    assert learned.config.em is None
    assert "marked scans only: no usable records" in learned.stats["message"]
    assert "1 records not used" in learned.stats["message"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weak_labels.csv", "seriesuid;lobe\n", "weak_labels.csv: header: expected the columns"),
        ("reports/patient1.doc", "a nodule", "reports: reports: expected files <series UID>.txt"),
    ],
)
def test_records_that_cannot_be_read_stop_the_training_with_one_message(
    lesson, load, app_dir, studies, name, content, message
):
    (studies / name).parent.mkdir(exist_ok=True)
    (studies / name).write_text(content)
    with pytest.raises(InputError, match=message):
        lesson()
    failed = load().info()["train_stats"][MODEL]["message"]
    assert failed.startswith(f"failed: {studies}")
    assert message in failed
    assert not (app_dir / "model" / MODEL / "report.html").exists()


def test_records_can_lie_elsewhere(lesson, studies, tmp_path):
    write_records(studies, "patient1,RUL,,,-50,,,")
    (tmp_path / "records").mkdir()
    write_records(tmp_path / "records", "patient1,LLL,,,-60,,,")
    for conf in ("records", "records/weak_labels.csv"):
        learned = lesson(records=str(tmp_path / conf))
        (label,) = learned.weak["patient1"]
        assert (label.lobe, label.z_lps_mm) == (Lobe.LLL, -60)


class Pacs:
    """A DICOMweb client of a PACS with one series of a phantom."""

    base_url = "http://127.0.0.1/dicom-web"

    def __init__(self, folder: Path):
        self.headers = [pydicom.dcmread(file) for file in sorted(folder.iterdir())]
        self.uid = str(self.headers[0].SeriesInstanceUID)
        self.fetched = 0
        self.stored: list[pydicom.Dataset] = []
        self.answer: pydicom.Dataset | Exception = pydicom.Dataset()

    def search_for_series(self, study_uid=None, search_filters=None):
        series = {"0020000E": self.uid, "0020000D": "1.2.3", "00100020": "somebody"}
        return [{
            tag: {"vr": "LO" if tag == "00100020" else "UI", "Value": [value]}
            for tag, value in series.items()
        }]  # fmt: skip

    def retrieve_series_metadata(self, study_uid, series_uid):
        return [json.loads(header.to_json()) for header in self.headers]

    def retrieve_series(self, study_uid, series_uid):
        self.fetched += 1
        return self.headers

    def store_instances(self, datasets):
        if isinstance(self.answer, Exception):
            raise self.answer
        self.stored += datasets
        return self.answer


@pytest.fixture
def pacs(tmp_path):
    """A phantom in a DICOMweb datastore with its client; the InstanceNumbers run from the head."""
    phantom = make_phantom(5, nodule_count=1)
    write_dicom_series(phantom, tmp_path / "pacs")
    client = Pacs(tmp_path / "pacs")
    datastore = DICOMWebDatastore(client, {"Modality": "CT"}, cache_path=str(tmp_path / "cache"))
    yield phantom, datastore, client
    datastore._observer.stop()
    datastore._observer.join()


def test_the_mask_of_a_pacs_series_lies_on_the_voxels_that_its_viewer_shows(truthful, pacs):
    """In the order of the NIfTI file that MONAI Label makes: viewers take voxels as they come."""
    phantom, datastore, client = pacs
    truthful.findings = [Proposal(item.nodule, 2.0) for item in phantom.nodules]
    result = truthful.infer({"model": MASK, "image": client.uid, **AS_OHIF}, datastore)
    mask, _ = read_mask(result)
    converted = nib.load(datastore.get_image_uri(client.uid))
    np.testing.assert_array_equal(np.asanyarray(converted.dataobj), phantom.hu)
    np.testing.assert_array_equal(
        mask, nodule_mask([item.nodule for item in phantom.nodules], phantom.grid)
    )
    assert client.stored == []


def test_a_report_is_stored_on_request_and_stays_one_object(truthful, pacs):
    phantom, datastore, client = pacs
    truthful.findings = [Proposal(item.nodule, 2.0) for item in phantom.nodules]
    for model in (MODEL, MASK):
        request = {"model": model, "image": client.uid, "store_sr": "true"}
        result = truthful.infer(request, datastore)
        os.unlink(result["file"])
    first, second = client.stored
    assert first.Modality == "SR" and first.SOPInstanceUID == second.SOPInstanceUID
    assert result["params"]["sr"]["SOPInstanceUID"] == first.SOPInstanceUID
    file = client.headers[0]
    assert (first.PatientID, first.StudyInstanceUID) == (file.PatientID, file.StudyInstanceUID)
    diameter, certainty = (item.value for item in first.iterall() if item.keyword == "NumericValue")
    assert diameter == pytest.approx(phantom.nodules[0].nodule.diameter_mm, abs=1e-4)
    assert certainty == pytest.approx(88.0797, abs=1e-3)


def test_a_pacs_that_does_not_take_the_report_is_named(truthful, pacs):
    _, datastore, client = pacs
    request = {"model": MASK, "image": client.uid, "store_sr": True}
    client.answer = requests.ConnectionError("nobody there")
    with pytest.raises(HTTPException, match="the report was not stored: nobody there") as caught:
        truthful.infer(request, datastore)
    assert caught.value.status_code == 503
    client.answer = pydicom.Dataset()
    client.answer.FailedSOPSequence = [pydicom.Dataset()]
    client.answer.FailedSOPSequence[0].FailureReason = 0x0122
    with pytest.raises(HTTPException, match="the PACS refused the report: failure reason 290"):
        truthful.infer(request, datastore)


def test_a_pacs_series_with_a_missing_slice_is_refused_with_the_reason(truthful, pacs):
    _, datastore, client = pacs
    del client.headers[20]
    with pytest.raises(HTTPException, match="missing slices") as caught:
        truthful.infer({"model": MASK, "image": client.uid}, datastore)
    assert caught.value.status_code == 422


def records_of_pacs(trainer, datastore, folder: Path, labels):
    write_weak_labels(folder / "weak_labels.csv", labels)
    records = sys.modules["lib.records"].read_records(str(folder))
    return trainer.recorded_studies(datastore, records)


def test_records_of_a_pacs_find_their_slice_by_its_headers(load, pacs, tmp_path):
    """By number, by series and number, by UID; the series is fetched only for a usable record."""
    load()
    trainer = sys.modules["lib.trainers.nodule_detection"]
    phantom, datastore, client = pacs
    number = phantom.weak_labels[0].slice_number
    assert number is not None
    sop_uid = str(client.headers[number - 1].SOPInstanceUID)
    z_mm = float(client.headers[number - 1].ImagePositionPatient[2])
    label = replace(phantom.weak_labels[0], slice_convention=SliceConvention.DICOM_INSTANCE)
    free = replace(label, slice_number=None, slice_convention=None)
    wrong = [
        (replace(label, slice_number=1000), "slice_number"),
        (replace(label, series_number=77), "series_number"),
        (replace(free, sop_instance_uid="1.2.3.4"), "sop_instance_uid"),
    ]
    for bad, field in wrong:
        weak, (rejected,) = records_of_pacs(trainer, datastore, tmp_path, [bad])
        assert (weak, rejected.field) == ([], field)
        assert rejected.where.startswith(f"{tmp_path / 'weak_labels.csv'}, row 2")
    assert client.fetched == 0
    for good in (label, replace(label, series_number=1), replace(free, sop_instance_uid=sop_uid)):
        (weak,), rejected = records_of_pacs(trainer, datastore, tmp_path, [good])
        assert rejected == []
        assert (weak.study.series_uid, weak.study.patient_id) == (client.uid, "somebody")
        assert weak.labels[0].z_lps_mm == pytest.approx(z_mm)
    assert client.fetched == 1
    np.testing.assert_array_equal(read_volume(weak.study.path).hu, phantom.hu)


def test_a_pacs_that_does_not_tell_the_headers_is_named(load, pacs, tmp_path, monkeypatch):
    load()
    trainer = sys.modules["lib.trainers.nodule_detection"]
    phantom, datastore, client = pacs

    def fails(*arguments):
        raise requests.HTTPError("404 for url")

    monkeypatch.setattr(client, "retrieve_series_metadata", fails)
    weak, rejected = records_of_pacs(trainer, datastore, tmp_path, phantom.weak_labels)
    assert weak == []
    assert f"{client.base_url}, series {client.uid}: DICOM headers" in str(rejected[0])


def test_an_address_has_no_records(load):
    load()
    assert sys.modules["lib.records"].read_records("http://127.0.0.1/dicom-web") == Records()
