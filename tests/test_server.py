"""The real server, driven by MONAI Label's own client: look, submit, train, and look again."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import requests
import SimpleITK as sitk
import torch
from monailabel.client import MONAILabelClient
from monailabel.client.client import MONAILabelClientException
from scipy import ndimage
from scipy.spatial.transform import Rotation
from serving import APP, MODEL, copy_app, ended, serving, stats, wait_for

from deepem.geometry import RAS_TO_LPS, Grid
from deepem.markups import read_markups
from deepem.model import fingerprint, load_model, publish
from deepem.nodule import Nodule
from deepem.phantom import make_phantom

SHIPPED = f"pretrained_{MODEL}.pt"
DIAMETER_MM = 14.0
TRAIN_S = 180

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Server:
    client: MONAILabelClient
    models: Path
    studies: Path
    truth: dict[str, Nodule]  # of the scans that have a nodule
    log: Path


def plant(hu: np.ndarray, center: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """A copy with a solid sphere whose surface runs through voxels as in a scan."""
    offsets = np.moveaxis(np.indices(hu.shape), 0, -1) - center
    inside = DIAMETER_MM / 2 - np.linalg.norm(offsets * spacing_mm, axis=-1)
    share = np.clip(inside + 0.5, 0, 1)
    return np.rint(hu * (1 - share) + 60 * share).astype(np.int16)


def write_ct(path: Path, hu: np.ndarray, grid: Grid) -> None:
    if path.name.endswith(".nii.gz"):
        nib.save(nib.Nifti1Image(hu, RAS_TO_LPS @ grid.affine_lps_mm), path)
        return
    image = sitk.GetImageFromArray(hu.transpose(2, 1, 0))
    image.SetOrigin(grid.affine_lps_mm[:3, 3])
    image.SetSpacing(grid.spacing_mm)
    image.SetDirection((grid.affine_lps_mm[:3, :3] / grid.spacing_mm).ravel())
    sitk.WriteImage(image, str(path))


def write_studies(folder: Path) -> dict[str, Nodule]:
    """One chest in three poses, a sphere in another place of the lungs in each, and one without.

    Returns what lies where.
    """
    phantom = make_phantom(11, nodule_count=0)
    hu, grid = phantom.hu, phantom.grid
    depth = ndimage.distance_transform_edt(phantom.lobes > 0, grid.spacing_mm)
    deep = np.argwhere(depth > DIAMETER_MM / 2 + 4)
    places = deep[[len(deep) // 5, len(deep) // 2, len(deep) * 4 // 5]]

    flip = np.diag([-1.0, -1.0, -1.0, 1.0])
    flip[:3, 3] = np.array(hu.shape) - 1
    turn = np.eye(4)
    turn[:3, :3] = Rotation.from_euler("zx", (12, -8), degrees=True).as_matrix()
    turned = Grid(turn @ grid.affine_lps_mm, hu.shape)
    aligned, flipped, oblique = (plant(hu, place, grid.spacing_mm) for place in places)
    write_ct(folder / "aligned.nii.gz", aligned, grid)
    write_ct(
        folder / "flipped.mha", flipped[::-1, ::-1, ::-1], Grid(grid.affine_lps_mm @ flip, hu.shape)
    )
    write_ct(folder / "oblique.nrrd", oblique, turned)
    write_ct(folder / "clean.nii.gz", hu, grid)
    (folder / "zz_broken.nii.gz").write_bytes(b"no image")
    (folder / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n")
    worlds = {"aligned": grid, "flipped": grid, "oblique": turned}  # a flip turns only the array
    return {
        name: Nodule(tuple(world.to_world(place)), DIAMETER_MM)
        for (name, world), place in zip(worlds.items(), places, strict=True)
    }


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    """The app in a folder of its own, on a port of its own, on the loopback."""
    if not (APP / "model" / SHIPPED).is_file():
        pytest.fail(f"the app ships no model: {APP / 'model' / SHIPPED} is missing")
    root = tmp_path_factory.mktemp("server")
    app = copy_app(root / "app")
    studies = root / "studies"
    studies.mkdir()
    truth = write_studies(studies)
    with serving(app, studies, root) as running:
        yield Server(running.client, app / "model", studies, truth, running.log)


@pytest.fixture(autouse=True)
def server_log(server, request) -> Iterator[None]:
    """Print what the server said meanwhile, which pytest shows when the test fails."""
    start = server.log.stat().st_size
    yield
    print(server.log.read_text()[start:][-8000:])


def slicer_label(folder: Path, *nodules: Nodule) -> Path:
    """What Slicer submits: the boxes in the scene, and one of its own that nobody has placed."""
    boxes = [(nodule.center_lps_mm, [nodule.diameter_mm] * 3) for nodule in nodules]
    boxes.append(((0, 0, 0), [0, 0, 0]))
    markups = [
        {
            "type": "ROI",
            "coordinateSystem": "LPS",
            "coordinateUnits": "mm",
            "locked": False,
            "fixedNumberOfControlPoints": False,
            "labelFormat": "%N-%d",
            "lastUsedControlPointNumber": 1,
            "controlPoints": [{"id": "1", "label": "R-1", "position": list(center)}],
            "measurements": [{"name": "volume", "enabled": False, "units": "cm3"}],
            "roiType": "Box",
            "center": list(center),
            "orientation": [-1.0, -0.0, -0.0, -0.0, -1.0, -0.0, 0.0, 0.0, 1.0],
            "size": size,
            "insideOut": False,
        }
        for center, size in boxes
    ]
    path = folder / "label.json"
    path.write_text(json.dumps({"@schema": "markups-schema-v1.0.3.json#", "markups": markups}))
    return path


def assert_found(file: str, params: dict, truth: Nodule, within_mm: float = 1.0) -> None:
    """The best finding lies at the truth, in the markups and in the answer alike."""
    nodules = read_markups(Path(file))
    assert nodules
    error_mm = np.linalg.norm(np.subtract(nodules[0].center_lps_mm, truth.center_lps_mm))
    assert error_mm <= within_mm
    np.testing.assert_allclose(params["nodules"][0]["center_lps_mm"], nodules[0].center_lps_mm)


def test_the_server_tells_what_it_offers(server):
    info = server.client.info()
    assert info["labels"] == ["nodule"]
    assert list(info["models"]) == [MODEL, "nodule_mask"]
    assert info["models"][MODEL]["type"] == "detection"
    assert list(info["trainers"]) == [MODEL]
    assert not info.get("config")
    assert info["datastore"] == {"total": 5, "completed": 0, "label_tags": {}}
    assert info["train_stats"] == {MODEL: {}}


def test_a_sample_to_label_is_offered(server):
    sample = server.client.next_sample("first", {})
    assert sample["id"] == "aligned"
    assert Path(sample["path"]).name == "aligned.nii.gz"
    assert server.client.next_sample("random", {})["id"] in [*server.truth, "clean", "zz_broken"]


@pytest.mark.parametrize("pose", ["aligned", "flipped", "oblique"])
def test_a_sphere_is_found_where_it_is(server, pose):
    file, params = server.client.infer(MODEL, pose, {"score_threshold": ["0.1", "0.5"]})
    assert_found(file, params, server.truth[pose])
    (point,) = json.loads(Path(file).read_text())["markups"][0]["controlPoints"]
    best = params["nodules"][0]
    expected = f"nodule 1  p={best['probability']:.2f}  {best['diameter_mm']:.1f} mm"
    assert point["label"] == expected


def test_no_finding_is_a_file_that_slicer_can_load(server):
    file, params = server.client.infer(MODEL, "clean", {"score_threshold": "1"})
    assert params["nodules"] == []
    assert read_markups(Path(file)) == ()
    assert len(json.loads(Path(file).read_text())["markups"]) == 1


def test_a_scan_that_was_sent_along_is_searched(server):
    scan = str(server.studies / "flipped.mha")
    session = server.client.create_session(scan)["session_id"]
    file, params = server.client.infer(MODEL, "", {}, session_id=session)
    assert_found(file, params, server.truth["flipped"])
    file, params = server.client.infer(MODEL, "mine", {}, file=scan)
    assert_found(file, params, server.truth["flipped"])


def test_others_are_answered_while_scans_are_searched(server):
    """In MONAI Label's event loop, one question at most gets in between."""
    client = server.client
    waited_s = []
    with ThreadPoolExecutor(2) as pool:
        searches = [
            pool.submit(client.infer, MODEL, pose, {"score_threshold": "0.1"})
            for pose in ("oblique", "aligned")
        ]
        while not any(search.done() for search in searches):
            started = time.monotonic()
            assert client.info()["models"]
            assert client.next_sample("first", {})["id"]  # another one each time: it was skipped
            waited_s.append(time.monotonic() - started)
    print(f"{len(waited_s)} rounds, slowest {max(waited_s):.3f} s")
    assert len(waited_s) >= 5
    for pose, search in zip(("oblique", "aligned"), searches, strict=True):
        assert_found(*search.result(), server.truth[pose])
    with pytest.raises(MONAILabelClientException, match="404"):
        client.train_status()  # of the one process that answers all: no training was started


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/datastore/label?image=nobody", 404),
        ("/datastore/label?image=aligned&tag=..%2F..%2Fx", 422),
        ("/datastore/label?image=..%2Faligned", 404),
        ("/datastore/image?image=..%2Fx", 422),
    ],
)
def test_a_name_that_leads_elsewhere_is_refused_and_nothing_is_written(server, path, status):
    before = sorted(server.studies.parent.glob("**/x*"))
    field = "label" if "/label" in path else "file"
    sent = {field: ("label.json" if field == "label" else "scan.nii", b"{}")}
    answer = requests.put(f"{server.client._server_url}{path}", files=sent, timeout=60)
    assert answer.status_code == status, answer.text
    assert "expected" in answer.json()["detail"]
    assert sorted(server.studies.parent.glob("**/x*")) == before


@pytest.mark.parametrize(
    ("model", "image", "message"),
    [
        (MODEL, "nobody", "Status: 404;.*expected the id of a scan on this server, got 'nobody'"),
        (MODEL, "../studies/aligned.nii.gz", "Status: 404;.*expected the id"),
        (MODEL, str(APP), "Status: 404;.*expected the id"),
        (MODEL, "zz_broken", "Status: 422;.*zz_broken.nii.gz: file: expected a readable"),
        ("lungs", "aligned", "Status: 404;.*no model 'lungs'"),
    ],
)
def test_what_cannot_be_served_is_refused_and_the_server_lives_on(server, model, image, message):
    with pytest.raises(MONAILabelClientException) as caught:
        server.client.infer(model, image, {})
    assert re.search(message, caught.value.msg)
    assert server.client.info()["models"]


def test_labels_are_submitted_trained_on_and_the_better_model_is_served(server, tmp_path):
    """Submit as Slicer does; train, stop, go on; the new model answers the next request."""
    client = server.client
    for image, nodule in server.truth.items():
        client.save_label(image, str(slicer_label(tmp_path, nodule)), params={"label_info": []})
    client.save_label("clean", str(slicer_label(tmp_path)), params={"label_info": []})
    assert read_markups(server.studies / "labels" / "final" / "oblique.json") == (
        server.truth["oblique"],
    )
    assert client.info()["datastore"]["completed"] == 4
    assert client.next_sample("first", {})["id"] == "zz_broken"

    forgetful = forget(server.models / SHIPPED, server.models / f"{MODEL}.pt")
    _, params = client.infer(MODEL, "aligned", {"score_threshold": "0"})
    assert params["model"] == forgetful  # a model that is swapped in is served at once

    request = {"steps": 24, "seed": 1, "device": ["cpu"]}
    assert client.train_start(MODEL, dict(request))["status"] in ("SUBMITTED", "RUNNING")
    wait_for(lambda: stats(client).get("epoch", 0) >= 1, TRAIN_S, "progress")
    running = stats(client)
    assert 0 < running["epoch"] <= running["total_epochs"]
    assert not running["total_time"]
    assert 0 <= running["best_metric"] <= 1
    assert client.train_stop()["status"] == "STOPPED"
    assert not client.train_status(check_if_running=True)
    assert load_model(server.models / f"{MODEL}.pt")[1].weights_fingerprint == forgetful

    datastore = (server.studies / "datastore_v2.json").read_bytes()
    client.train_start(MODEL, dict(request))
    status = wait_for(lambda: ended(client), TRAIN_S, "the end of the training")
    assert status["status"] == "DONE", "\n".join(status["details"])
    assert "going on from step" in server.log.read_text()
    finished = stats(client)
    assert finished["message"].startswith("published: CPM")
    assert finished["total_time"]
    assert finished["best_metric"] > 0
    assert (server.studies / "datastore_v2.json").read_bytes() == datastore

    _, card = load_model(server.models / f"{MODEL}.pt")
    assert card.metrics["cpm"] == pytest.approx(finished["best_metric"])
    for pose, nodule in server.truth.items():
        file, params = client.infer(MODEL, pose, {"score_threshold": "0"})
        assert params["model"] == card.weights_fingerprint != forgetful
        assert_found(file, params, nodule, within_mm=DIAMETER_MM / 2)  # after 24 steps: a hit


def forget(source: Path, target: Path) -> str:
    """Publish the model with all that it knows about what is a nodule wiped out of its last layer.

    It still measures where a thing is, so a few steps teach it again. Returns its fingerprint.
    """
    network, card = load_model(source)
    head = network.head[-1]
    anchors = len(card.network.anchors_mm)
    with torch.no_grad():
        head.weight.view(anchors, -1, *head.weight.shape[1:])[:, 0] = 0
        head.bias.view(anchors, -1)[:, 0] = -2.0
    weights = network.state_dict()
    publish(weights, replace(card, weights_fingerprint=fingerprint(weights)), target)
    return fingerprint(weights)
