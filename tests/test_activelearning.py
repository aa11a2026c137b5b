"""Next sample and scoring in the app, loaded as MONAI Label loads it."""
# ruff: noqa: F811

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from test_app import (  # noqa: F401
    APP,
    MODEL,
    ROW,
    app_dir,
    load,
    studies,
)

from deepem.geometry import RAS_TO_LPS
from deepem.markups import write_markups
from deepem.model import fingerprint, load_model, publish
from deepem.ranking.strategies import DEFAULT, STRATEGIES, Ranked
from deepem.ranking.table import read_ranking, write_ranking


def publish_like_the_shipped(path: Path, change: float = 0.0) -> None:
    """The shipped model with a changed threshold: another model that finds about as much."""
    network, card = load_model(APP / "model" / f"pretrained_{MODEL}.pt")
    with torch.no_grad():
        network.head[-1].bias += change
    weights = network.state_dict()
    publish(weights, replace(card, weights_fingerprint=fingerprint(weights)), path)


@pytest.fixture(scope="module")
def ct(tmp_path_factory) -> Path:
    """A scan so small that looking at it takes no time."""
    hu = np.random.default_rng(0).normal(-800, 60, (48, 48, 40)).astype(np.int16)
    path = tmp_path_factory.mktemp("ct") / "ct.nii"
    nib.save(nib.Nifti1Image(hu, RAS_TO_LPS), path)
    return path


@pytest.fixture
def many(load, studies, ct):
    """The app on scans named a to e."""
    (studies / "patient1.nii").unlink()
    for name in "abcde":
        os.link(ct, studies / f"{name}.nii")
    return load()


def rank_as(app, strategy: str, *images: str, failed=()) -> None:
    """What a scoring would have written."""
    places = [Ranked(image, at, 1 / at, f"reason {image}") for at, image in enumerate(images, 1)]
    places += [Ranked(image, len(places) + 1, None, "cannot be used: rubbish") for image in failed]
    write_ranking(Path(app.app_dir) / "model" / MODEL / "ranking" / f"{strategy}.csv", places)


def ask(app, client: str | None = None, strategy: str = DEFAULT) -> str | None:
    return app.next_sample({"strategy": strategy, "client_id": client}).get("id")


def submit(app, image: str, tmp_path: Path) -> None:
    label = tmp_path / "label.json"
    write_markups(label, [])
    app.datastore().save_label(image, str(label), "final", {})


def test_the_reply_says_which_scan_and_why(many):
    rank_as(many, DEFAULT, "d", "b", "a", "c", "e")
    reply = many.next_sample({"strategy": DEFAULT, "client_id": "ann"})
    assert Path(reply.pop("path")).name == "d.nii"
    assert reply == {"id": "d", "rank": 1, "score": 1.0, "why": "reason d"}
    json.dumps(reply)


def test_random_is_the_default_and_every_strategy_has_its_own_ranking(many):
    for at, strategy in enumerate(STRATEGIES):
        rank_as(many, strategy, "abcdeab"[at])
    for at, strategy in enumerate(STRATEGIES):
        client = f"c{at}"
        if at < 5:  # the scans a and b are at hand after that
            assert ask(many, client, strategy) == "abcdeab"[at]
    rank_as(many, DEFAULT, "e", "a")
    many._strategies["random"]._desk._leases.clear()
    assert ask(many, "ohif", "random") == "e"


def test_the_default_can_be_chosen(load, studies, ct):
    other = next(name for name in STRATEGIES if name != DEFAULT)
    info = load(strategy=other).info()["strategies"]
    assert list(info)[0] == other
    assert info["random"] == info[other] != info[DEFAULT]


def test_two_annotators_never_have_the_same_scan(many, tmp_path):
    rank_as(many, DEFAULT, *"abcde")
    assert [ask(many, "ann"), ask(many, "bob")] == ["a", "b"]
    assert ask(many, "bob", "first") == "c"  # whatever they ask for
    assert ask(many, "bob", "shuffle") not in "ac"
    submit(many, "a", tmp_path)
    assert ask(many, "ann") not in ("a", "c")


def test_when_others_have_all_that_is_left_there_is_nothing(many, tmp_path):
    for image in "abcd":
        submit(many, image, tmp_path)
    assert ask(many, "ann") == "e"
    assert many.next_sample({"strategy": DEFAULT, "client_id": "bob"}) == {}
    assert ask(many, "ann") == "e"  # the only one: skipping it brings it back
    submit(many, "e", tmp_path)
    assert many.next_sample({"strategy": DEFAULT, "client_id": "ann"}) == {}


def test_a_skipped_scan_comes_back_after_all_others(many, tmp_path):
    rank_as(many, DEFAULT, *"abcde")
    assert [ask(many, "ann") for _ in range(5)] == list("abcde")
    assert [ask(many, "ann") for _ in range(2)] == ["a", "b"]
    submit(many, "b", tmp_path)
    assert [ask(many, "ann") for _ in range(4)] == list("cdea")


def test_what_one_skips_another_may_get_but_later(many):
    rank_as(many, DEFAULT, *"abcde")
    assert [ask(many, "ann"), ask(many, "ann")] == ["a", "b"]
    assert [ask(many, "bob") for _ in range(4)] == ["c", "d", "e", "a"]


def test_clients_without_a_name_get_different_scans(many):
    rank_as(many, DEFAULT, *"abcde")
    assert [ask(many), ask(many, ""), ask(many)] == list("abc")


def test_a_lease_ends_and_the_scan_is_back_in_its_place(many):
    rank_as(many, DEFAULT, *"abcde")
    desk = many._strategies[DEFAULT]._desk
    now = [0.0]
    desk._clock = lambda: now[0]
    assert ask(many, "ann") == "a"
    now[0] = 3599
    assert ask(many, "bob") == "b"
    now[0] = 3600
    assert ask(many, "cid") == "a"


def test_the_length_of_a_lease_is_a_setting(load):
    assert load(lease_minutes="0.5")._strategies["random"]._desk._lease_s == 30


def test_without_scores_every_scan_is_offered_once_in_an_order_that_stays(many, load):
    first = [many.next_sample({"strategy": DEFAULT, "client_id": "ann"}) for _ in range(5)]
    assert {one["why"] for one in first} == {"not scored yet"}
    assert {one["score"] for one in first} == {None}
    images = [one["id"] for one in first]
    assert sorted(images) == list("abcde") != images  # not by name
    again = load()
    assert [ask(again, "ann") for _ in range(5)] == images


def test_new_scans_come_after_scored_ones_and_broken_ones_last(many):
    rank_as(many, DEFAULT, "d", "a", failed=["b"])
    replies = [many.next_sample({"strategy": DEFAULT, "client_id": "ann"}) for _ in range(5)]
    images = [one["id"] for one in replies]
    assert images[:2] == ["d", "a"] and set(images[2:4]) == {"c", "e"} and images[4] == "b"
    assert replies[2]["why"] == "not scored yet"
    assert (replies[4]["score"], replies[4]["why"]) == (None, "cannot be used: rubbish")


def test_labelled_and_vanished_scans_of_a_ranking_are_not_offered(many, tmp_path):
    rank_as(many, DEFAULT, "gone", "a", "b")
    submit(many, "a", tmp_path)
    assert ask(many, "ann") == "b"


def test_a_new_ranking_counts_at_once_and_an_old_one_is_not_read_again(many, monkeypatch):
    rank_as(many, DEFAULT, "c")
    assert ask(many, "ann") == "c"
    ranked = sys.modules["lib.activelearning.ranked"]
    monkeypatch.setattr(ranked, "read_ranking", lambda file: pytest.fail("read again"))
    ask(many, "bob")
    monkeypatch.undo()
    rank_as(many, DEFAULT, "e")
    file = Path(many.app_dir) / "model" / MODEL / "ranking" / f"{DEFAULT}.csv"
    os.utime(file, ns=(1, 1))
    assert ask(many, "cid") == "e"


def test_rankings_are_in_memory_before_the_first_question(many, load, monkeypatch):
    for at, strategy in enumerate(STRATEGIES):
        rank_as(many, strategy, "abcdeab"[at])
    app = load()
    ranked = sys.modules["lib.activelearning.ranked"]
    monkeypatch.setattr(ranked, "read_ranking", lambda file: pytest.fail("read only now"))
    for at, strategy in enumerate(list(STRATEGIES)[:5]):
        assert ask(app, f"c{at}", strategy) == "abcdeab"[at]


def test_a_ranking_that_is_none_is_told_and_does_no_harm(many, caplog):
    rank_as(many, DEFAULT, "c")
    file = Path(many.app_dir) / "model" / MODEL / "ranking" / f"{DEFAULT}.csv"
    file.write_text("rubbish\n")
    assert ask(many, "ann") in "abcde"
    assert "no ranking" in caplog.text


# --- scoring


@pytest.fixture
def scored(load, app_dir, studies, tmp_path, ct):
    """The app with three scans, one of them labelled, one broken, and a record of the third."""
    shutil.copy(ct, studies / "patient2.nii")
    (studies / "broken.nii.gz").write_bytes(b"no image")
    (studies / "weak_labels.csv").write_text(ROW + "patient1,RUL,9,one_at_head,,,,reader\n")
    publish_like_the_shipped(app_dir / "model" / f"{MODEL}.pt")
    app = load()
    submit(app, "patient2", tmp_path)
    return app


def tables(app) -> dict[str, bytes]:
    folder = Path(app.app_dir) / "model" / MODEL / "ranking"
    return {file.stem: file.read_bytes() for file in folder.glob("*.csv")}


def test_scoring_ranks_what_is_not_labelled_and_is_incremental(scored, studies, app_dir, ct):
    datastore = (studies / "datastore_v2.json").read_bytes()
    state = scored.scoring({"method": MODEL})
    assert state["message"] == "3 scans ranked, 1 of them last: they cannot be used"
    assert scored.info()["scoring"][MODEL]["message"] == state["message"]
    assert (studies / "datastore_v2.json").read_bytes() == datastore
    ranking_folder = app_dir / "model" / MODEL / "ranking"
    for strategy in STRATEGIES:
        ranking = read_ranking(ranking_folder / f"{strategy}.csv")
        assert [one.series_uid for one in ranking] == ["patient1", "broken"]
        assert "broken.nii.gz: file: expected a readable" in ranking[1].why
    assert "the record names the right upper lobe, slice 9" in ranking[0].why
    assert scored.next_sample({"strategy": "em_entropy"})["why"] == ranking[0].why

    (evidence,) = (app_dir / "model" / MODEL / "evidence").glob("*.jsonl")
    before = evidence.read_text()
    assert len(before.splitlines()) == 3
    first = tables(scored)
    scored.scoring({"method": MODEL})
    assert evidence.read_text() == before and tables(scored) == first
    shutil.copy(ct, studies / "patient3.nii")
    scored.datastore().refresh()
    scored.scoring({"method": MODEL})
    after = evidence.read_text()
    assert after.startswith(before) and len(after.splitlines()) == 4
    assert b"patient3" in tables(scored)["shuffle"]

    publish_like_the_shipped(app_dir / "model" / f"{MODEL}.pt", change=0.1)
    scored.scoring({"method": MODEL})
    (other,) = (app_dir / "model" / MODEL / "evidence").glob("*.jsonl")
    assert other.name != evidence.name and len(other.read_text().splitlines()) == 4


def test_without_a_model_scoring_says_so(load):
    app = load()
    assert app.scoring({"method": MODEL})["message"] == "there is no model yet"
    assert app._scoring_methods[MODEL].situation(app.datastore()) is None


def test_scoring_in_its_own_process_writes_nothing_but_its_files(
    scored, app_dir, studies, monkeypatch, ct
):
    monkeypatch.setenv("MONAI_LABEL_DATASTORE_READ_ONLY", "true")  # as the server sets it
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    datastore = (studies / "datastore_v2.json").read_bytes()
    shutil.copy(ct, studies / "patient4.nii")
    command = [sys.executable, "-m", "monailabel.interfaces.utils.app", "-m", "scoring"]
    command += ["--app", str(app_dir), "--studies", str(studies)]
    command += ["--request", json.dumps({"method": MODEL})]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert (studies / "datastore_v2.json").read_bytes() == datastore
    assert set(tables(scored)) == set(STRATEGIES)


def test_skip_scoring_leaves_it_out(load):
    app = load(skip_scoring="true")
    assert app.info()["scoring"] == {}
    assert ask(app, "ann") == "patient1"


class Starts:
    """Stands for the processes: counts them, and can be busy."""

    def __init__(self):
        self.count = 0
        self.busy = False

    def __call__(self) -> bool:
        self.count += not self.busy
        return not self.busy


def test_scoring_is_started_when_something_changed_and_only_then(
    load, app_dir, studies, tmp_path, ct
):
    app, start = load(), Starts()
    scoring = app._scoring_methods[MODEL]
    keeper = sys.modules["lib.scoring"].Keeper(scoring, app.datastore(), start)
    assert not keeper.look()  # no model

    publish_like_the_shipped(app_dir / "model" / f"{MODEL}.pt")
    assert keeper.look() and not keeper.look()  # one that failed is not repeated
    app.scoring({"method": MODEL})
    assert not keeper.look()
    fresh = sys.modules["lib.scoring"].Keeper(scoring, app.datastore(), start)
    assert not fresh.look()  # a new start of the server has nothing to do

    shutil.copy(ct, studies / "patient2.nii")
    app.datastore().refresh()
    start.busy = True
    assert not keeper.look()
    start.busy = False
    assert keeper.look()
    app.scoring({"method": MODEL})

    submit(app, "patient1", tmp_path)
    for _ in range(3):
        ask(app, "ann")
    assert not keeper.look()  # neither a label nor a question is a reason

    (studies / "weak_labels.csv").write_text(ROW + "patient2,RUL,,,,,,reader\n")
    assert keeper.look()
    publish_like_the_shipped(app_dir / "model" / f"{MODEL}.pt", change=0.2)
    assert keeper.look() and not keeper.look()
    assert start.count == 4


def test_a_keeper_survives_a_server_of_scans_that_does_not_answer(load, app_dir, monkeypatch):
    publish_like_the_shipped(app_dir / "model" / f"{MODEL}.pt")
    app, start = load(), Starts()
    keeper_module = sys.modules["lib.scoring.keeper"]
    monkeypatch.setattr(keeper_module, "EVERY_S", 0.01)
    answers = iter([OSError("down"), OSError("down")])
    scoring = app._scoring_methods[MODEL]
    situation = scoring.situation

    def sometimes(datastore):
        error = next(answers, None)
        if error:
            raise error
        return situation(datastore)

    monkeypatch.setattr(scoring, "situation", sometimes)
    keeper = keeper_module.Keeper(scoring, app.datastore(), start)
    keeper.watch().join(1.0)
    assert start.count == 1
