"""The MONAI Label app in this process, loaded as MONAI Label loads it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import pytest
import torch
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.interfaces.utils.app import app_instance, clear_cache

import deepem
from deepem.errors import InputError
from deepem.geometry import RAS_TO_LPS
from deepem.markups import read_markups, write_markups
from deepem.model import ModelCard, fingerprint, publish
from deepem.network import PRESETS, NoduleNet
from deepem.nodule import Nodule
from deepem.phantom import make_phantom

APP = Path(__file__).parent.parent / "apps" / "deepem_app"
MODEL = "nodule_detection"


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
    assert info["labels"] == {"nodule": 1}
    assert next(iter(info["models"])) == MODEL
    model = info["models"][MODEL]
    assert (model["type"], model["labels"], model["dimension"]) == ("detection", {"nodule": 1}, 3)
    assert set(info["strategies"]) == {"random", "first"}
    assert info["datastore"]["total"] == 1  # the table beside the scan is no scan
    for task in (model, info["trainers"][MODEL]):
        for value in task["config"].values():
            choices = value if isinstance(value, list) else []
            assert isinstance(value, (int, float, list))
            assert all(isinstance(choice, str) for choice in choices)
    json.dumps(info)


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
    ("request_", "message"), [({"steps": "many"}, "steps"), ({"minutes": -1}, "minutes")]
)
def test_training_refuses_a_wrong_setting(load, request_, message):
    with pytest.raises(ValueError, match=f"{message}: expected"):
        load().train({"model": MODEL, **request_})
