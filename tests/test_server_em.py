"""The real server trains by EM on submitted labels and on records."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from scipy import ndimage
from serving import MODEL, copy_app, ended, serving, stats, wait_for

from deepem.fit import TrainConfig
from deepem.geometry import RAS_TO_LPS
from deepem.judging import by_nodules
from deepem.labelled import LabelledStudy, load_labelled
from deepem.markups import write_markups
from deepem.model import load_model
from deepem.nodule import Nodule, SliceConvention, WeakLabel
from deepem.phantom import make_phantom
from deepem.scan import ScanCache
from deepem.tables import write_weak_labels
from deepem.training import train
from deepem.volume import Study

SOLID_HU, GROUND_GLASS_HU = 60, -450
TRAIN_S = 240

pytestmark = pytest.mark.slow


def write_chests(folder: Path, count: int, seed: int, *hu: int) -> list[LabelledStudy]:
    """Synthetic chests with one sphere of every density ``hu``; records beside them."""
    folder.mkdir()
    chests, records = [], []
    for number in range(count):
        rng = np.random.default_rng([seed, number])
        phantom = make_phantom(int(rng.integers(2**31)), nodule_count=0)
        image, grid, uid = phantom.hu, phantom.grid, phantom.series_uid
        depth_mm = ndimage.distance_transform_edt(phantom.lobes > 0, grid.spacing_mm)
        position_mm = grid.to_world(np.moveaxis(np.indices(image.shape), 0, -1))
        nodules: list[Nodule] = []
        for density in hu:
            diameter_mm = rng.uniform(9, 15)
            apart = [
                np.linalg.norm(position_mm - other.center_lps_mm, axis=-1) > 20 for other in nodules
            ]
            free = np.argwhere(np.all([depth_mm > diameter_mm / 2 + 2, *apart], axis=0))
            at = free[rng.integers(len(free))]
            nodule = Nodule(tuple(grid.to_world(at)), diameter_mm)
            distance_mm = np.linalg.norm(position_mm - nodule.center_lps_mm, axis=-1)
            share = np.clip(diameter_mm / 2 - distance_mm + 0.5, 0, 1)
            painted = np.rint(image * (1 - share) + density * share)
            image = np.where(share > 0, np.maximum(image, painted), image).astype(np.int16)
            nodules.append(nodule)
            one_at_head = image.shape[2] - int(at[2])
            records.append(WeakLabel(uid, None, one_at_head, SliceConvention.ONE_AT_HEAD,
                                     diameter_mm=round(diameter_mm)))  # fmt: skip
        path = folder / f"{uid}.nii"
        nib.save(nib.Nifti1Image(image, RAS_TO_LPS @ grid.affine_lps_mm), path)
        chests.append(LabelledStudy(Study(uid, path, uid), tuple(nodules)))
    write_weak_labels(folder / "weak_labels.csv", records)
    return chests


def cpm(model: Path, chests: list[LabelledStudy], cache: Path) -> float:
    scans, skipped = load_labelled(chests, ScanCache(cache))
    assert not skipped
    return by_nodules(load_model(model)[0], scans, torch.device("cpu")).cpm


def test_em_through_the_client_publishes_a_model_that_is_better_on_other_chests(tmp_path):
    """Six chests are marked, ten have records: what a short training began, EM goes on with."""
    kinds = SOLID_HU, GROUND_GLASS_HU
    held_out = write_chests(tmp_path / "held_out", 8, 300, *kinds)
    studies = tmp_path / "studies"
    recorded = write_chests(studies, 10, 200, *kinds)
    marked = write_chests(tmp_path / "marked", 6, 100, *kinds)
    app = copy_app(tmp_path / "app")
    served = app / "model" / f"{MODEL}.pt"
    train(TrainConfig(steps=50, patch=48, validate_times=1), marked, tmp_path / "start",
          validation=marked, publish_to=served)  # fmt: skip
    before = cpm(served, held_out, tmp_path / "cache")
    for item in marked:
        shutil.copy(item.study.path, studies)

    with serving(app, studies, tmp_path) as server:
        client = server.client
        for item in marked:
            label = tmp_path / f"{item.study.series_uid}.json"
            write_markups(label, item.nodules)
            client.save_label(item.study.series_uid, str(label), params={"label_info": []})
        client.train_start(MODEL, {"method": "map", "rounds": 2, "steps": 100, "device": "cpu"})
        first = "e-step 1 of 2, scan "
        wait_for(lambda: stats(client).get("message", "").startswith(first), TRAIN_S, first)
        status = wait_for(lambda: ended(client), TRAIN_S, "the end of the training")
        print(server.log.read_text()[-8000:])  # shown when the test fails
        assert status["status"] == "DONE"
        message = stats(client)["message"]
        assert message.startswith("published: CPM")
        assert f"EM (map) on the records of {len(recorded)} scans; report: " in message
        report = Path(message.split("report: ")[1])
        assert "<html" in report.read_text()
        _, card = load_model(served)
        scan = recorded[0].study.series_uid
        assert client.infer(MODEL, scan, {})[1]["model"] == card.weights_fingerprint

    (_, *rounds) = card.history  # the start was measured too
    assert [entry["em"]["round"] for entry in rounds] == [1, 2]
    assert card.training["em"]["method"] == "map"
    assert card.data["weak_scans"] == len(recorded) and card.data["weak_labels"] == 20
    after = cpm(served, held_out, tmp_path / "cache")
    print(f"CPM on held-out chests: {before:.3f} before, {after:.3f} after")
    assert after > before + 0.15
