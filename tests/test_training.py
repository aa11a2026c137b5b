import logging
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepem import fit
from deepem.boxes import Targets
from deepem.errors import InputError
from deepem.fit import TrainConfig, detection_loss
from deepem.labelled import LabelledStudy, patient_hash, split_by_patient
from deepem.model import load_model
from deepem.network import PRESETS, NoduleNet
from deepem.nodule import Nodule
from deepem.patches import LabelledScan, Patch, PatchSampler
from deepem.scan import ScanCache
from deepem.training import train
from deepem.volume import Study

SHORT = TrainConfig(steps=6, batch=2, patch=48, validate_times=2, device="cpu")


@pytest.fixture(scope="module")
def trained(easy_studies, tmp_path_factory):
    """A training that works, all its progress, and what it came to."""
    out = tmp_path_factory.mktemp("trained")
    seen = []
    config = TrainConfig(steps=80, batch=3, patch=48, validate_times=4, learning_rate=2e-3, seed=1)
    return out, train(config, easy_studies, out, on_progress=seen.append), seen


def test_training_learns_and_publishes_with_everything_that_was_measured(trained, easy_studies):
    out, result, _ = trained
    assert result.published and result.cpm > 0.5, result
    net, card = load_model(out)
    assert card.metrics["cpm"] == result.cpm
    assert len(card.metrics["sensitivity"]) == 7
    assert card.metrics["scans"] + card.data["training_scans"] == len(easy_studies)
    assert card.training["seed"] == 1 and card.training["steps"] == 80
    assert len(card.data_fingerprint) == 32
    assert len(card.data["training_patients"]) == card.data["training_scans"]
    assert [entry["step"] for entry in card.history] == [20, 40, 60, 80]
    assert not (out / "checkpoint.pt").exists()
    assert list((out / "tensorboard").iterdir())
    assert net.training is False


def test_progress_tells_stage_step_and_time_left(trained):
    _, _, seen = trained
    assert [p.stage for p in seen[:6]] == ["preparing"] * 6
    assert seen[-1].step == seen[-1].steps == 80 and seen[-1].epoch == seen[-1].epochs == 4
    training = [p for p in seen if p.stage == "training"]
    assert training[0].eta_s > training[-2].eta_s >= 0
    assert all(0 <= p.best_cpm <= 1 for p in training)


def test_a_worse_model_does_not_replace_the_served_one(trained, easy_studies, tmp_path):
    out, result, _ = trained
    before = (out / "model.pt").read_bytes()
    again = train(SHORT, easy_studies, tmp_path, served=out / "model.pt")
    assert not again.published and not (tmp_path / "model.pt").exists()
    assert again.served_cpm > again.cpm
    assert again.reason.startswith("not published")
    # In its own folder it competes with itself; the same model again is a tie, and a tie stays.
    tie = train(replace(SHORT, steps=1, learning_rate=1e-12, validate_times=1, seed=1),
                easy_studies, out, init=out)  # fmt: skip
    assert not tie.published and tie.cpm == pytest.approx(tie.served_cpm)
    assert (out / "model.pt").read_bytes() == before


class Killed(Exception):
    pass


def run_with_kill(studies, out, config, kill_after_step):
    def kill(progress):
        if progress.stage == "training" and progress.step == kill_after_step:
            raise Killed

    with pytest.raises(Killed):
        train(config, studies, out, on_progress=kill)


def state_at_the_end(studies, out, config, monkeypatch):
    kept = {}
    monkeypatch.setattr(
        "deepem.training._verdict", lambda *args: kept.setdefault("verdict", "done")
    )
    original = fit.Run.start.__func__

    def start(cls, *args):
        kept["run"] = original(cls, *args)
        return kept["run"]

    monkeypatch.setattr(fit.Run, "start", classmethod(start))
    train(config, studies, out)
    run = kept["run"]
    return [run.network.state_dict(), run.averaged.module.state_dict()], run.history


def test_a_killed_training_ends_as_if_it_had_not_been_killed(easy_studies, tmp_path, monkeypatch):
    config = replace(SHORT, steps=24, validate_times=4, batch=1)
    straight, history = state_at_the_end(easy_studies, tmp_path / "a", config, monkeypatch)
    run_with_kill(easy_studies, tmp_path / "b", config, kill_after_step=20)
    assert (tmp_path / "b" / "checkpoint.pt").exists()
    resumed, resumed_history = state_at_the_end(easy_studies, tmp_path / "b", config, monkeypatch)
    for one, other in zip(straight, resumed, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)
    assert [(e["step"], e["cpm"]) for e in history] == [
        (e["step"], e["cpm"]) for e in resumed_history
    ]


def test_the_checkpoint_of_another_run_is_not_taken_up(easy_studies, tmp_path, caplog):
    config = replace(SHORT, steps=20, batch=1, validate_times=4)
    run_with_kill(easy_studies, tmp_path, config, kill_after_step=10)
    with caplog.at_level(logging.WARNING, "deepem"):
        result = train(replace(SHORT, seed=5), easy_studies, tmp_path)
    assert "starting anew" in caplog.text
    assert result.history[-1]["step"] == SHORT.steps


def test_the_network_of_the_paper_trains_on_four_channels(easy_studies, tmp_path):
    config = replace(SHORT, preset="paper", steps=2, batch=1, validate_times=1)
    result = train(config, easy_studies[:3], tmp_path)
    assert [entry["step"] for entry in result.history] == [2]
    assert math.isfinite(result.history[0]["loss"])


def test_minutes_end_a_training_too(easy_studies, tmp_path):
    config = replace(SHORT, steps=None, minutes=0.05, validate_times=1)
    result = train(config, easy_studies, tmp_path)
    assert len(result.history) == 1 and 0.05 <= result.history[0]["minutes"] < 0.15


def test_a_bad_scan_is_skipped_and_named_the_others_train(easy_studies, tmp_path):
    corrupt = tmp_path / "corrupt.nii.gz"
    corrupt.write_bytes(b"no image")
    bad = LabelledStudy(Study("corrupt", corrupt, "x"), (Nodule((0, 0, 0), 5),))
    result = train(SHORT, [bad, *easy_studies[:3]], tmp_path, validation=easy_studies[4:])
    assert len(result.skipped) == 1 and str(corrupt) in result.skipped[0]
    assert len(result.history) == 2


def test_nothing_to_measure_on_is_an_error(easy_studies, tmp_path):
    clean = [replace(item, nodules=()) for item in easy_studies]
    with pytest.raises(ValueError, match="nodules in scans of at least 2 patients.*got 0 of 6"):
        train(SHORT, clean, tmp_path)
    with pytest.raises(ValueError, match="validation scans: expected at least one nodule"):
        train(SHORT, easy_studies[:2], tmp_path, validation=clean[2:])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"preset": "huge"}, r"preset: expected one of \['paper', 'slim'\], got 'huge'"),
        ({"minutes": 3.0}, "steps or minutes: expected exactly one"),
        ({"steps": 0}, "steps: expected more than 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate: expected more than 0"),
        ({"patch": 50}, "patch: expected a multiple of 16 from 48 on, got 50"),
        ({"validation_share": 1.0}, "validation_share: expected 0..1"),
    ],
)
def test_a_wrong_setting_says_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**({"steps": 10} | change))


def has_nodules(item):
    return bool(item.nodules)


def fake_studies(patients, marked):
    nodule = (Nodule((0, 0, 0), 5),)
    return [
        LabelledStudy(Study(f"s{at}", None, patient), nodule if patient in marked else ())
        for at, patient in enumerate(patients)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_patient_is_on_both_sides_and_both_sides_have_a_nodule(seed):
    studies = fake_studies(["a", "a", "b", "c", "c", "d", "e", "f"], {"a", "c"})
    training, validation = split_by_patient(studies, 0.25, seed, marked=has_nodules)
    sides = [{item.study.patient_id for item in side} for side in (training, validation)]
    assert not sides[0] & sides[1] and len(training) + len(validation) == 8
    assert all(any(item.nodules for item in side) for side in (training, validation))
    # A scan that arrives later moves nobody who has a fixed place among more patients.
    more = [*studies, *fake_studies(["z"], {"z"})]
    moved = {
        item.study.patient_id for item in split_by_patient(more, 0.25, seed, marked=has_nodules)[1]
    } ^ sides[1]
    assert len(moved) <= 3


def test_patients_that_a_model_knows_are_not_held_out_while_others_are_there():
    studies = fake_studies(list("abcdef"), set("abcdef"))
    known = frozenset(patient_hash(patient) for patient in "abcd")
    for seed in range(10):
        _, validation = split_by_patient(studies, 0.3, seed, known, marked=has_nodules)
        assert {item.study.patient_id for item in validation} <= {"e", "f"}
    everybody = frozenset(patient_hash(patient) for patient in "abcdef")
    assert split_by_patient(studies, 0.3, 0, everybody, marked=has_nodules)[1]


def test_the_loss_by_hand():
    """One anchor per cell, 2 cells: one positive at logit 0, one negative at logit 0."""
    maps = torch.zeros(1, 5, 2, 1, 1)
    nothing = torch.empty(0, dtype=torch.long)
    targets = Targets(
        positive=torch.tensor([0]),
        regression=torch.tensor([[0.5, 0.0, 0.0, 2.0]]),
        nodule=torch.tensor([0]),
        weight=torch.tensor([1.0]),
        doubt=torch.tensor([0.0]),
        negative=torch.tensor([1]),
    )
    config = replace(SHORT, hard_negatives=1)
    loss = detection_loss(maps, [Patch(torch.empty(0), targets)], config, 0)
    assert float(loss) == pytest.approx(0.5 * math.log(2) * 2 + 0.5 * 0.5**2 + 1.5)
    # Half the weight of a single anchor halves what it teaches; its doubt is one more negative.
    half = replace(targets, weight=torch.tensor([0.5]), doubt=torch.tensor([0.5]))
    loss = detection_loss(maps, [Patch(torch.empty(0), half)], config, 0)
    assert float(loss) == pytest.approx(0.5 * math.log(2) * 1.5 + 0.5 * (0.5 * 0.5**2 + 1.5))
    empty = torch.empty(0)
    clean = Targets(nothing, torch.empty(0, 4), nothing, empty, empty, torch.tensor([0, 1]))
    loss = detection_loss(maps, [Patch(torch.empty(0), clean)], config, 0)
    assert float(loss) == pytest.approx(0.5 * math.log(2))


def test_weight_and_doubt_hold_a_logit_at_the_posterior():
    """The gradient vanishes where the detector says the posterior: log(0.3 / 0.7)."""
    maps = torch.zeros(1, 5, 1, 1, 1)
    maps[0, 0] = math.log(0.3 / 0.7)
    maps.requires_grad_(True)
    targets = Targets(
        positive=torch.tensor([0]),
        regression=torch.zeros(1, 4),
        nodule=torch.tensor([0]),
        weight=torch.tensor([0.3]),
        doubt=torch.tensor([0.7]),
        negative=torch.empty(0, dtype=torch.long),
    )
    detection_loss(maps, [Patch(torch.empty(0), targets)], SHORT, 0).backward()
    assert float(maps.grad.abs().max()) < 1e-7


def test_a_patch_that_teaches_nothing_has_no_gradient():
    maps = torch.zeros(1, 5, 2, 1, 1, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.long)
    empty = torch.empty(0)
    targets = Targets(nothing, torch.empty(0, 4), nothing, empty, empty, nothing)
    loss = detection_loss(maps, [Patch(torch.empty(0), targets)], SHORT, 0)
    loss.backward()
    assert float(loss.detach()) == 0 and not maps.grad.any()


def test_only_the_hardest_negatives_count():
    maps = torch.full((1, 5, 4, 1, 1), -50.0, requires_grad=True)
    with torch.no_grad():
        maps[0, 0, 2] = 3.0
    nothing = torch.empty(0, dtype=torch.long)
    empty = torch.empty(0)
    targets = Targets(nothing, torch.empty(0, 4), nothing, empty, empty, torch.arange(4))
    config = replace(SHORT, hard_negatives=1)
    detection_loss(maps, [Patch(torch.empty(0), targets)], config, 0).backward()
    assert maps.grad[0, 0].nonzero()[:, 0].tolist() == [2]


def test_a_patch_shows_its_nodules_where_its_targets_say(easy_studies, tmp_path):
    """Flips, rotations and zoom move voxels and targets alike: the bright spot is the nodule."""
    net = NoduleNet(PRESETS["slim"])
    cache = ScanCache(tmp_path)
    scans = [LabelledScan(cache.get(item.study), item.nodules) for item in easy_studies[:2]]
    sampler = PatchSampler(scans, net, 48, seed=3)
    checked = 0
    for patch in sampler.batch(0, 40):
        anchors = net.config.anchors_mm
        cells = (48 // 4) ** 3
        for at, regression in zip(patch.targets.positive, patch.targets.regression, strict=True):
            edge = anchors[int(at) // cells]
            cell = np.array(np.unravel_index(int(at) % cells, (12, 12, 12)))
            center = cell * 4 + 1.5 + regression[:3].numpy() * edge
            if ((center > 3) & (center < 44)).all():
                i, j, k = np.rint(center).astype(int)
                around = patch.x[0, i - 1 : i + 2, j - 1 : j + 2, k - 1 : k + 2]
                assert around.mean() > 0.5 and patch.x[0].min() < 0.4
                checked += 1
    assert checked > 60


def test_batches_depend_on_seed_and_step_alone(easy_studies, tmp_path):
    cache = ScanCache(tmp_path)
    scans = [LabelledScan(cache.get(item.study), item.nodules) for item in easy_studies[:2]]
    net = NoduleNet(PRESETS["slim"])
    one, same, other = (PatchSampler(scans, net, 32, seed=seed) for seed in (3, 3, 4))
    one.batch(0, 3)
    torch.testing.assert_close(one.batch(7, 2)[1].x, same.batch(7, 2)[1].x, rtol=0, atol=0)
    assert not torch.equal(one.batch(7, 2)[0].x, other.batch(7, 2)[0].x)
    assert not torch.equal(one.batch(7, 2)[0].x, one.batch(8, 2)[0].x)


def test_a_model_that_is_none(tmp_path, trained):
    with pytest.raises(InputError, match="a published model file, got nothing there"):
        load_model(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"rubbish")
    with pytest.raises(InputError, match="a model that `deepem train` published"):
        load_model(tmp_path)
    out, _, _ = trained
    content = torch.load(out / "model.pt", weights_only=True)
    content["model"]["head.2.bias"] += 1
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"weights: expected fingerprint .*, got others"):
        load_model(tmp_path)
