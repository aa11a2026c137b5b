"""Two annotators at the real server: next sample, infer, submit, train, scoring, next sample."""

from __future__ import annotations

import pytest
from monailabel.client import MONAILabelClient
from serving import MODEL, copy_app, ended, serving, stats, wait_for
from test_server import SHIPPED, forget, slicer_label

from deepem.model import load_model
from deepem.phantom import write_phantoms
from deepem.ranking.strategies import DEFAULT
from deepem.ranking.table import read_ranking
from deepem.tables import read_annotations

WAIT_S = 240

pytestmark = pytest.mark.slow


def test_two_annotators_do_a_whole_session(tmp_path):
    studies, app = tmp_path / "studies", copy_app(tmp_path / "app")
    write_phantoms(studies, 5, seed=31, nodule_count=2)
    truth = read_annotations(studies / "annotations.csv")
    (studies / "zz_broken.nii.gz").write_bytes(b"no image")
    forgetful = forget(app / "model" / SHIPPED, app / "model" / f"{MODEL}.pt")

    with serving(app, studies, tmp_path) as server:
        url = server.client.get_server_url()
        ann, bob = (MONAILabelClient(url, str(tmp_path), client_id=one) for one in ("ann", "bob"))

        # Nobody has looked at anything yet; the server begins to by itself.
        early = ann.next_sample("random", {})
        assert (early["why"], early["score"]) == ("not scored yet", None)

        def scored_with(model: str) -> dict | None:
            state = ann.info()["scoring"][MODEL]
            return state if state.get("model") == model else None

        state = wait_for(lambda: scored_with(forgetful), WAIT_S, "the first scores")
        assert state["message"] == "6 scans ranked, 1 of them last: they cannot be used"

        ranking = read_ranking(app / "model" / MODEL / "ranking" / f"{DEFAULT}.csv")
        in_order = [one.series_uid for one in ranking if one.series_uid != early["id"]]
        assert in_order[-1] == "zz_broken"
        labelled: list[str] = []
        for _ in range(2):
            samples = [ann.next_sample("random", {}), bob.next_sample(DEFAULT, {})]
            for client, sample in zip((ann, bob), samples, strict=True):
                assert sample["id"] == in_order[len(labelled)]  # no scan twice
                assert sample["why"] and sample["score"] is not None
                _, params = client.infer(MODEL, sample["id"], {"score_threshold": "0.5"})
                assert params["model"] == forgetful
                label = slicer_label(tmp_path, *truth.get(sample["id"], []))
                client.save_label(sample["id"], str(label), params={"label_info": []})
                labelled.append(sample["id"])
        assert ann.info()["datastore"]["completed"] == 4

        ann.train_start(MODEL, {"method": "none", "steps": 24, "device": "cpu"})
        status = wait_for(lambda: ended(ann), WAIT_S, "the end of the training")
        assert status["status"] == "DONE", "\n".join(status["details"])
        assert stats(ann)["message"].startswith("published: CPM")
        trained = load_model(app / "model" / f"{MODEL}.pt")[1].weights_fingerprint
        assert trained != forgetful
        wait_for(lambda: scored_with(trained), WAIT_S, "the scores of the new model")

        # What was skipped at the start comes after all others, even after the broken scan.
        broken = ann.next_sample("random", {})
        assert broken["id"] == "zz_broken" and "cannot be used" in broken["why"]
        last = bob.next_sample("random", {})
        assert last["id"] == early["id"] and last["score"] is not None
        assert MONAILabelClient(url, str(tmp_path), "cid").next_sample("random", {}) == {}
