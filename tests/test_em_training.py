"""Training by EM on scans with records: the whole loop, its roles, its interruption."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepem import fit, rounds
from deepem.em import EmConfig
from deepem.fit import TrainConfig
from deepem.labelled import LabelledStudy, WeakStudy, patient_hash, weak_studies
from deepem.model import load_model
from deepem.nodule import CleanStatement, Lobe, Nodule, SliceConvention, WeakLabel
from deepem.observation import LobeModel
from deepem.scan import ScanCache
from deepem.training import _Roles, train
from deepem.volume import Study
from deepem.weak_labels import Records

EM = EmConfig(rounds=2, warm_start=0.5, clearance_mm=8, null=0.0, certain=0.0)
CONFIG = TrainConfig(
    steps=100, batch=3, patch=48, validate_times=4, learning_rate=2e-3, seed=1, em=EM
)
SHORT = replace(CONFIG, steps=12, batch=2, validate_times=2)


@pytest.fixture(scope="module")
def roles(easy_studies):
    """Two marked scans, three with records (slices alone), and one that judges."""
    weak = [
        WeakStudy(
            item.study,
            tuple(
                WeakLabel(
                    item.study.series_uid, z_lps_mm=nodule.center_lps_mm[2], source=f"row {at}"
                )
                for at, nodule in enumerate(item.nodules)
            ),
        )
        for item in easy_studies[2:5]
    ]
    return easy_studies[:2], weak, easy_studies[5:]


@pytest.fixture(scope="module")
def trained(roles, tmp_path_factory):
    labelled, weak, validation = roles
    out = tmp_path_factory.mktemp("em")
    seen = []
    result = train(CONFIG, labelled, out, weak=weak, validation=validation, on_progress=seen.append)
    return out, result, seen


def test_em_understands_the_records(trained, easy_studies):
    """In the last round every label has chosen the sphere that it was made from."""
    _, result, _ = trained
    assert len(result.explained) == 3
    for item in result.explained:
        nodules = next(
            one.nodules for one in easy_studies if one.study.series_uid == item.scan.series_uid
        )
        for nodule, chosen in zip(nodules, item.chosen, strict=True):
            (at,) = chosen
            found = item.proposals[at].nodule
            distance = np.subtract(found.center_lps_mm, nodule.center_lps_mm)
            assert np.linalg.norm(distance) < nodule.diameter_mm / 2


def test_every_round_is_logged_and_published_with_the_model(trained):
    out, result, seen = trained
    _, card = load_model(out)
    logged = [entry["em"] for entry in card.history if "em" in entry]
    assert [one["round"] for one in logged] == [1, 2] and card.history == result.history
    assert all(one["scans"] == 3 and one["labels"] == 6 for one in logged)
    assert logged[-1]["unexplained"] <= 0.5 and np.isfinite(logged[-1]["entropy"])
    assert card.training["em"]["method"] == "map" and card.training["em"]["rounds"] == 2
    assert card.data["weak_scans"] == 3 and card.data["weak_labels"] == 6
    assert len(card.data["training_patients"]) == 5
    second = json.loads((out / "rounds" / "02.json").read_text())
    label = second["scans"][0]["labels"][0]
    assert label["source"] == "row 0"
    assert sum(label["posterior"]) + label["null"] == pytest.approx(1, abs=1e-3)
    assert len(label["posterior"]) == len(second["scans"][0]["proposals"])
    stages = {progress.stage for progress in seen}
    assert "e-step 2 of 2, scan 3 of 3" in stages and "training" in stages


def state_at_the_end(roles, out, monkeypatch, on_progress=None):
    """Weights, history and lobe model when a training is done."""
    labelled, weak, validation = roles
    kept = {}
    original = fit.Run.start.__func__

    def start(cls, *args, **more):
        kept["run"] = original(cls, *args, **more)
        return kept["run"]

    with monkeypatch.context() as patched:
        patched.setattr(fit.Run, "start", classmethod(start))
        result = train(
            SHORT, labelled, out, weak=weak, validation=validation, on_progress=on_progress
        )
    run = kept["run"]
    history = [{k: v for k, v in e.items() if k in ("step", "cpm", "em")} for e in result.history]
    return run.averaged.module.state_dict(), history, run.model.lobe


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    ("stage", "step"), [("training", 10), ("e-step 1 of 2, scan 2 of 3", 6), ("validating", 9)]
)
def test_a_killed_training_ends_as_if_it_had_not_been_killed(
    roles, tmp_path, monkeypatch, stage, step
):
    # The first tells come every 10 steps, and the checkpoint must be older than what is lost.
    monkeypatch.setattr(fit, "_CHECKPOINT_EVERY_S", 0.0)

    def kill(progress):
        if progress.stage == stage and progress.step == step:
            raise Killed

    straight = state_at_the_end(roles, tmp_path / "a", monkeypatch)
    with pytest.raises(Killed):
        state_at_the_end(roles, tmp_path / "b", monkeypatch, kill)
    assert (tmp_path / "b" / "checkpoint.pt").exists()
    resumed = state_at_the_end(roles, tmp_path / "b", monkeypatch)
    for name, tensor in straight[0].items():
        torch.testing.assert_close(resumed[0][name], tensor, rtol=0, atol=0)
    assert resumed[1] == straight[1]
    np.testing.assert_array_equal(resumed[2].weights, straight[2].weights)
    assert not np.array_equal(straight[2].weights, LobeModel.anatomical().weights)


def test_without_a_marked_scan_records_judge_a_model_that_is_there(roles, trained, tmp_path):
    _, weak, _ = roles
    result = train(SHORT, [], tmp_path, weak=weak, init=trained[0])
    assert "the records of 1 validation scans" in result.reason
    assert [entry["em"]["scans"] for entry in result.history if "em" in entry] == [2, 2]
    assert result.history[0]["step"] == 0 and "em" not in result.history[0]  # the start itself
    assert 0 <= result.cpm <= 1


def teachers(roles, trained, tmp_path, monkeypatch, em):
    """How a ruined training goes on: weights that propose in each round, by their fingerprint."""
    labelled, weak, validation = roles
    seen = []

    def propose_all(network, *args):
        seen.append(float(sum(parameter.sum() for parameter in network.parameters())))
        return rounds.propose_all(network, *args)

    monkeypatch.setattr(fit, "propose_all", propose_all)
    config = replace(SHORT, learning_rate=0.3, em=em)  # forgets what it knew
    result = train(config, labelled, tmp_path, weak=weak, validation=validation, init=trained[0])
    return seen, result


def test_the_best_network_proposes_and_a_ruined_one_is_not_published(
    roles, trained, tmp_path, monkeypatch
):
    seen, result = teachers(roles, trained, tmp_path, monkeypatch, EM)
    assert max(entry["cpm"] for entry in result.history[1:]) < result.history[0]["cpm"]
    assert seen[0] == seen[1]
    assert not result.published and "before the first step" in result.reason
    assert not (tmp_path / "model.pt").exists()


def test_the_newest_network_proposes_where_the_paper_is_asked_for(
    roles, trained, tmp_path, monkeypatch
):
    em = replace(EM, best_proposes=False)
    seen, _ = teachers(roles, trained, tmp_path, monkeypatch, em)
    assert seen[0] != seen[1]


def test_a_guess_that_is_not_certain_trains_nothing(roles, trained):
    labelled, weak, _ = roles
    cache = ScanCache(trained[0] / "cache")
    found = rounds.propose_all(load_model(trained[0])[0], weak, cache, torch.device("cpu"), -3.0)
    rows = {item.study.series_uid: rounds.to_rows(proposals) for item, proposals in found}

    def chosen(certain):
        em = replace(EM, certain=certain)
        explained = rounds.explain_all(weak, rows, cache, rounds.first_model(em), em, 0, 1)
        return [(item.posterior.posterior[row].max(), at)
                for item in explained for row, at in enumerate(item.chosen)]  # fmt: skip

    guesses = chosen(0.0)
    limit = float(np.median([posterior for posterior, _ in guesses]))
    assert all(at for _, at in guesses)
    assert [bool(at) for _, at in chosen(limit)] == [p >= limit for p, _ in guesses]


def test_what_is_missing_is_said(roles, tmp_path):
    labelled, weak, validation = roles
    with pytest.raises(ValueError, match="or weak labels and a model to start from"):
        train(SHORT, [], tmp_path, weak=weak)
    with pytest.raises(ValueError, match="weak labels: expected at least one scan"):
        train(SHORT, labelled, tmp_path, weak=(), validation=validation)


def test_an_unreadable_weak_scan_is_skipped_and_named(roles, tmp_path):
    labelled, weak, validation = roles
    corrupt = tmp_path / "corrupt.nii.gz"
    corrupt.write_bytes(b"no image")
    bad = WeakStudy(Study("corrupt", corrupt, "x"), (WeakLabel("corrupt", z_lps_mm=0.0),))
    result = train(SHORT, labelled, tmp_path, weak=[*weak, bad], validation=validation)
    assert any(str(corrupt) in line for line in result.skipped)
    assert len(result.explained) == 3


def weak_study(name, patient, labels=1):
    return WeakStudy(Study(name, None, patient), (WeakLabel(name, Lobe.RUL),) * labels)


def marked_study(name, patient, nodules=1):
    return LabelledStudy(Study(name, None, patient), (Nodule((0, 0, 0), 5),) * nodules)


def split(labelled, weak, known=frozenset(), **change):
    return _Roles.given(replace(CONFIG, **change), labelled, weak, None, known)


def patients(items):
    return {item.study.patient_id for item in items}


@pytest.mark.parametrize("seed", range(5))
def test_nobody_who_judges_is_trained_on(seed):
    labelled = [marked_study(f"m{at}", f"p{at}") for at in range(6)]
    weak = [weak_study(f"w{at}", f"p{at}") for at in range(10)]
    roles = split(labelled, weak, seed=seed)
    judges = patients(roles.validation)
    assert judges and not judges & (patients(roles.training) | patients(roles.weak))
    assert patients(roles.weak) == {f"p{at}" for at in range(10)} - judges
    roles = split([], weak, seed=seed)
    judges = patients(roles.judged_by_records)
    assert len(judges) == 2 and not judges & patients(roles.weak)


def test_a_marked_scan_is_not_a_weak_one_too_and_a_single_marked_patient_never_judges():
    records = [("a", "p0"), ("b", "p0"), ("c", "p1"), ("d", "p2")]
    roles = split([marked_study("a", "p0")], [weak_study(*one) for one in records])
    assert [item.study.series_uid for item in roles.training] == ["a"]
    assert "b" in {item.study.series_uid for item in roles.weak}
    assert len(roles.weak) == 2 and len(roles.judged_by_records) == 1
    assert "a" not in {item.study.series_uid for item in [*roles.weak, *roles.judged_by_records]}


def test_patients_that_a_model_knows_judge_only_if_nobody_else_is_there():
    weak = [weak_study(f"w{at}", f"p{at}") for at in range(10)]
    known = frozenset(patient_hash(f"p{at}") for at in range(8))
    assert patients(split([], weak, known).judged_by_records) <= {"p8", "p9"}


def test_without_em_records_play_no_role():
    labelled = [marked_study(f"m{at}", f"p{at}") for at in range(6)]
    assert not split(labelled, [weak_study("w", "x")], em=None).weak


def test_records_become_weak_studies_and_the_rest_is_named(easy_studies):
    studies = {item.study.series_uid: item.study for item in easy_studies}

    def label(uid, number, source):
        return WeakLabel(uid, None, number, SliceConvention.ONE_AT_HEAD, source=source)

    records = Records(
        labels=(
            label("easy0", 10, "row 2"),
            label("easy1", 10, "row 3"),
            label("easy1", 999, "row 4"),
            label("nowhere", 10, "row 5"),
        ),
        clean=(
            CleanStatement("easy2", "row 6"),
            CleanStatement("easy0", "row 7"),
            CleanStatement("gone", "row 8"),
        ),
    )
    weak, rejected = weak_studies(records, studies)
    by_name = {item.study.series_uid: item for item in weak}
    assert by_name.keys() == {"easy0", "easy2"}  # easy1 has a nodule that nobody can place
    assert by_name["easy2"].labels == ()
    assert by_name["easy0"].labels[0].z_lps_mm == pytest.approx(-200 + 80 - 10)
    reasons = [str(error) for error in rejected]
    assert len(reasons) == 5
    for row in (3, 4, 5, 7, 8):
        assert any(f"row {row}" in reason for reason in reasons), (row, reasons)
