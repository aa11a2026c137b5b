"""Which scan next: acquisition functions against values by hand, and rankings from real looks."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import logit as logit_of
from serving import APP

from deepem.cli import main
from deepem.detector import Detector
from deepem.em import e_step
from deepem.errors import InputError
from deepem.labelled import WeakStudy
from deepem.model import load_model
from deepem.network import PRESETS
from deepem.nodule import Lobe, Nodule, SliceConvention, WeakLabel
from deepem.ranking import scoring
from deepem.ranking.acquisition import (
    box_entropy,
    flip_inconsistency,
    foreground_aware,
    hybrid,
    k_center,
    top_mean,
)
from deepem.ranking.evidence import RecordEvidence, ScanEvidence
from deepem.ranking.scoring import EvidenceFile, Told, gather, said, score_scan, told_by
from deepem.ranking.strategies import DEFAULT, STRATEGIES, rank
from deepem.ranking.table import read_ranking, write_ranking
from deepem.scan import ScanCache, mirrored
from deepem.tables import write_annotations
from deepem.volume import Study
from deepem.weak_labels import Records

LN2 = np.log(2)
SHIPPED = APP / "model" / "pretrained_nodule_detection.pt"


def seen(uid: str, *probabilities: float, mirrored=None, features=(0.0,), records=None):
    """What a detector sees in a scan: findings in a row, 50 mm apart, 10 mm large."""

    def rows(values):
        p = np.array(values, float)
        table = np.zeros((len(p), 5))
        table[:, 0], table[:, 3], table[:, 4] = 50 * np.arange(len(p)), 10, logit_of(p)
        return table

    both = rows(probabilities), rows(probabilities if mirrored is None else mirrored)
    return ScanEvidence(uid, *both, np.array(features, float), records)


def order_of(strategy: str, *scans: ScanEvidence, **options) -> list[str]:
    return [one.series_uid for one in rank(strategy, scans, **options)]


# --- acquisition functions


def test_entropy_of_boxes_has_both_terms_and_falls_on_both_sides():
    assert box_entropy(np.zeros(1), top=1) == pytest.approx(LN2)
    p = 0.1
    by_hand = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    assert box_entropy(logit_of(np.array([p])), top=1) == pytest.approx(by_hand)
    assert box_entropy(logit_of(np.array([1 - p])), top=1) == pytest.approx(by_hand)
    assert box_entropy(np.array([800.0, -800.0]), top=2) == 0  # sure either way, and no NaN


def test_only_the_most_uncertain_boxes_count_so_clutter_is_not_favoured():
    cluttered, unsure = np.full(60, 0.06), np.array([0.5, 0.45, 0.55])
    assert cluttered.sum() > 0  # sixty small entropies add up to more than three large ones
    entropies = [-(p * np.log(p) + (1 - p) * np.log(1 - p)) for p in (cluttered, unsure)]
    assert entropies[0].sum() > entropies[1].sum()
    assert box_entropy(logit_of(cluttered)) < box_entropy(logit_of(unsure))
    more = np.concatenate([unsure, cluttered])
    assert box_entropy(logit_of(more)) == pytest.approx(box_entropy(logit_of(unsure)))


def test_a_sure_proposal_changes_nothing_and_no_proposals_are_the_least():
    assert top_mean(np.array([0.5, 0.1])) == pytest.approx(0.2)
    assert box_entropy(np.array([0.0, 30.0])) == pytest.approx(box_entropy(np.array([0.0])))
    assert box_entropy(np.empty(0)) == 0


def test_flip_consistency_by_hand():
    """A pair (.9, .6), one alone here (.5), one alone in the mirror image (.2)."""
    here = np.array([[0.0, 0, 0], [100, 0, 0]]), np.array([5.0, 5]), np.array([0.9, 0.5])
    there = np.array([[200.0, 0, 0], [0, 3, 0]]), np.array([5.0, 5]), np.array([0.2, 0.6])
    assert flip_inconsistency(*here, *there, top=3) == pytest.approx((0.5 + 0.3 + 0.2) / 3)
    assert flip_inconsistency(*here, *there, top=1) == pytest.approx(0.5)
    assert flip_inconsistency(*here, *here) == 0


def test_flip_pairs_one_to_one_and_only_where_a_centre_lies_in_the_other_sphere():
    one = np.zeros((1, 3)), np.array([5.0]), np.array([0.8])
    at_the_edge = np.array([[5.0, 0, 0]]), np.array([5.0]), np.array([0.8])
    assert flip_inconsistency(*one, *at_the_edge, top=2) == pytest.approx(0.8)
    two = np.array([[1.0, 0, 0], [2, 0, 0]]), np.array([5.0, 5]), np.array([0.8, 0.4])
    assert flip_inconsistency(*one, *two, top=2) == pytest.approx(0.2)  # the second stays alone
    # Two near pairs, though the nearest pair alone would leave a far one over.
    left = np.array([[0.0, 0, 0], [4, 0, 0]]), np.array([5.0, 5]), np.array([0.5, 0.5])
    right = np.array([[4.0, 0, 0], [8, 0, 0]]), np.array([5.0, 5]), np.array([0.5, 0.5])
    assert flip_inconsistency(*left, *right) == 0


def test_flip_without_findings_on_either_side_is_agreement():
    nothing = np.empty((0, 3)), np.empty(0), np.empty(0)
    something = np.zeros((1, 3)), np.array([5.0]), np.array([0.6])
    assert flip_inconsistency(*nothing, *nothing) == 0
    assert flip_inconsistency(*nothing, *something, top=1) == pytest.approx(0.6)
    assert flip_inconsistency(*something, *nothing, top=1) == pytest.approx(0.6)


def test_entropy_of_a_posterior_counts_the_null_hypothesis():
    even = e_step(np.zeros(2), np.zeros((1, 2)), log_null=0.0)  # thirds
    assert even.entropy == pytest.approx([np.log(3)])
    assert e_step(np.zeros(1), np.zeros((1, 1))).entropy == pytest.approx([0])
    assert e_step(np.zeros(0), np.zeros((2, 0))).entropy == pytest.approx([0, 0])


def test_foreground_aware_random_keeps_its_share_in_every_prefix(rng):
    foreground = np.zeros(100, bool)
    foreground[:12] = True  # one scan in eight
    order = foreground_aware(foreground, rng)
    assert sorted(order) == list(range(100))
    for count in range(1, 19):
        assert foreground[order[:count]].sum() >= 2 / 3 * count - 1e-9
    assert not foreground[order[18:]].any()


def test_foreground_aware_random_never_gives_less_than_chance_and_is_random(rng):
    many = np.ones(50, bool)
    many[:5] = False  # nine in ten have nodules; two in three would be fewer
    orders = [foreground_aware(many, rng) for _ in range(200)]
    assert np.mean([many[order[:10]].mean() for order in orders]) >= 0.9
    assert len({int(order[0]) for order in orders}) > 20
    assert len({int(order[-1]) for order in orders}) > 1
    for kind in (np.zeros(4, bool), np.ones(4, bool), np.zeros(0, bool)):
        assert sorted(foreground_aware(kind, rng)) == list(range(len(kind)))


def test_k_center_by_hand():
    """On a line, labelled at 0: first 10, then the middle 5, then the others by what is left."""
    features = np.array([[1.0], [10], [5], [9]])
    order, distance = k_center(features, np.array([[0.0]]), 2)
    scale = np.std([0, 1, 10, 5, 9])
    assert list(order) == [1, 2, 0, 3]
    assert distance * scale == pytest.approx([1, 10, 5, 1])
    order, _ = k_center(features, np.array([[0.0], [10]]), 1)
    assert order[0] == 2  # what is like a labelled scan does not come first


def test_k_center_does_not_ask_for_the_same_place_twice():
    cluster = np.concatenate([np.zeros((50, 2)), np.full((2, 2), 9.0), [[9.0, 0]]])
    order, distance = k_center(cluster, np.zeros((1, 2)), 53)
    assert sorted(order) == list(range(53))
    assert {tuple(cluster[at]) for at in order[:2]} == {(9, 9), (9, 0)}
    assert (np.diff(distance[order]) <= 1e-12).all()
    assert distance[order[2:]] == pytest.approx(0)


def test_k_center_without_labels_begins_in_the_middle_and_no_unit_decides():
    features = np.array([[0.0, 0], [1, 1000], [2, 2000]])
    order, distance = k_center(features, np.empty((0, 2)), 3)
    assert order[0] == 1
    assert (np.diff(distance[order]) <= 1e-12).all()
    by_metres, _ = k_center(features * [1, 1e-3], np.empty((0, 2)), 3)
    assert list(by_metres) == list(order)
    assert [len(part) for part in k_center(np.empty((0, 2)), np.zeros((1, 2)), 3)] == [0, 0]


def test_hybrid_takes_diverse_scans_of_the_uncertain_ones_only():
    uncertainty = np.array([0.9, 0.8, 0.7, 0.6, 0.1])
    features = np.array([[1.0], [1.1], [1.2], [5], [99]])  # the last is far but not uncertain
    order = hybrid(uncertainty, features, np.zeros((1, 1)), batch=1)
    assert list(order) == [3, 0, 1, 2, 4]


# --- strategies


def test_scans_without_boxes_do_not_go_to_the_front():
    unsure, sure, empty = seen("a", 0.5, 0.4), seen("b", 0.99), seen("c")
    assert order_of("box_entropy", empty, sure, unsure) == ["a", "b", "c"]
    changed = seen("d", 0.5, mirrored=())
    assert order_of("flip_consistency", empty, sure, changed)[0] == "d"


def test_larger_is_sooner_and_a_score_belongs_to_its_scan():
    """A margin that is sorted and then thrown away, or sorted the wrong way, fails here."""
    scans = [seen(f"s{at}", p) for at, p in enumerate((0.02, 0.5, 0.2, 0.97, 0.35))]
    ranking = rank("box_entropy", scans)
    assert [one.series_uid for one in ranking] == ["s1", "s4", "s2", "s3", "s0"]
    assert [one.rank for one in ranking] == [1, 2, 3, 4, 5]
    assert ranking[0].score == pytest.approx(LN2 / 3)
    assert [one.score for one in ranking] == sorted((one.score for one in ranking), reverse=True)


def record(entropy: float, missed: float = 0.0, words: str = "the lingula") -> RecordEvidence:
    return RecordEvidence(words, entropy, missed)


def test_the_most_ambiguous_record_decides():
    two = seen("two", 0.5, records=(record(0.1), record(1.2)))
    one = seen("one", 0.5, records=(record(0.9),))
    clean, none = seen("clean", 0.5, records=()), seen("none", 0.5)
    assert order_of("em_entropy", clean, none, one, two)[:2] == ["two", "one"]


def test_foreground_is_what_a_record_says_and_else_what_the_detector_says():
    assert seen("a", 0.1, records=(record(0),)).foreground
    assert not seen("a", 0.9, records=()).foreground
    assert seen("a", 0.1, 0.6).foreground
    assert not seen("a", 0.4).foreground and not seen("a").foreground


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_ranks_all_scans_once_whatever_their_order(strategy, rng):
    scans = [
        seen(f"s{at:02d}", *rng.uniform(0.05, 0.95, at % 5), features=rng.normal(size=3),
             mirrored=rng.uniform(0.05, 0.95, at % 3),
             records=[None, (), (record(rng.random()),)][at % 3])
        for at in range(20)
    ]  # fmt: skip
    labelled = scans[:3]
    ranking = rank(strategy, scans[3:], labelled, [("bad", "no image")], seed=1)
    assert sorted(one.series_uid for one in ranking[:-1]) == [f"s{at:02d}" for at in range(3, 20)]
    assert ranking[-1] == replace(ranking[-1], series_uid="bad", rank=18, score=None)
    assert ranking[-1].why == "cannot be used: no image"
    assert rank(strategy, scans[:2:-1], labelled, [("bad", "no image")], seed=1) == ranking
    assert rank(strategy, []) == []


@pytest.mark.parametrize("strategy", ["shuffle", "foreground", "box_entropy"])
def test_chance_and_ties_follow_the_seed(strategy):
    scans = [seen(f"s{at}", 0.5) for at in range(12)]
    first = {order_of(strategy, *scans, seed=seed)[0] for seed in range(30)}
    assert len(first) > 5
    assert order_of(strategy, *scans, seed=3) == order_of(strategy, *scans, seed=3)


def test_k_center_moves_away_from_what_was_labelled_meanwhile():
    """Nothing is kept from an earlier ranking that a new label would make stale."""
    scans = [seen(f"s{at}", 0.5, features=(at,)) for at in (0, 4, 5, 10)]
    labelled = [seen("old", 0.5, features=(0,))]
    assert order_of("k_center", *scans, labelled=labelled)[0] == "s10"
    labelled.append(seen("new", 0.5, features=(10,)))
    assert order_of("k_center", *scans, labelled=labelled)[0] == "s5"


def test_an_unknown_strategy_is_refused_and_the_default_is_one():
    with pytest.raises(ValueError, match="strategy: expected one of shuffle, .* got best"):
        rank("best", [seen("a", 0.5)])
    assert DEFAULT in STRATEGIES


def test_the_reason_is_a_sentence_that_a_person_can_check():
    def why(scan, strategy="box_entropy"):
        return rank(strategy, [scan])[0].why

    says = "the right upper lobe, slice 145"
    competing = seen("a", 0.5, 0.3, 0.9, 0.05, records=(record(np.log(3), words=says), record(0)))
    assert why(competing) == (
        "2 uncertain findings; the record names the right upper lobe, slice 145, "
        "but three proposals compete"
    )
    missed = seen("a", 0.3, records=(record(0.2, missed=0.9),))
    assert why(missed) == (
        "1 uncertain finding; the record names the lingula, where the detector finds nothing"
    )
    fits = seen("a", 0.95, records=(record(0.1),))
    assert why(fits) == "1 clear finding; the record names the lingula, and one proposal fits"
    assert why(seen("a", records=())) == "no findings; a record calls it free of nodules"
    assert why(seen("a", 0.05), "shuffle") == "drawn at random; no findings"


# --- looking at scans


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.load(SHIPPED, "cpu")


@pytest.fixture
def scan(easy_studies, tmp_path_factory):
    return ScanCache(tmp_path_factory.getbasetemp() / "prepared").get(easy_studies[0].study)


def test_a_mirrored_scan_has_the_same_things_in_the_same_places(scan):
    other = mirrored(scan)
    assert (other.image == scan.image[::-1]).all()
    index = np.array([[3, 5, 7], [0, 0, 0]])
    reverse = index * [-1, 1, 1] + [scan.image.shape[0] - 1, 0, 0]
    np.testing.assert_allclose(scan.grid.to_world(index), other.grid.to_world(reverse))
    center = scan.grid.to_world(index)
    size = np.array([6.0, 6.0])
    np.testing.assert_allclose(scan.mean_hu(center, size), other.mean_hu(center, size))


def test_what_is_found_in_the_mirror_image_lies_where_it_is_in_the_patient(
    detector, scan, easy_studies
):
    for proposals in (detector.propose(scan), detector.propose(mirrored(scan))):
        centers = [one.nodule.center_lps_mm for one in proposals]
        for nodule in easy_studies[0].nodules:
            assert np.linalg.norm(np.subtract(centers, nodule.center_lps_mm), axis=1).min() < 3


def test_a_look_has_proposals_both_ways_and_pooled_features(detector, scan):
    evidence = score_scan(detector, scan)
    assert evidence.proposals.shape[1] == 5 and len(evidence.proposals)
    logits = evidence.proposals[:, 4]
    assert (np.diff(logits) <= 0).all()
    assert len(evidence.mirrored) and not np.array_equal(evidence.mirrored, evidence.proposals)
    assert evidence.features.shape == (PRESETS["slim"].head_width,)
    assert evidence.features.std() > 0 and evidence.records is None
    assert len(score_scan(detector, scan, flip=False).mirrored) == 0
    assert not detector.network.head._forward_hooks  # the model is left as it was


def test_features_are_means_weighted_by_the_probability_of_a_nodule():
    pool = scoring._Pool()
    features = torch.tensor([1.0, 3.0]).reshape(1, 1, 2, 1, 1)
    maps = torch.zeros(1, 10, 2, 1, 1)  # two anchors
    maps[0, 0, :, 0, 0] = torch.tensor([0.0, -200.0])
    maps[0, 5, :, 0, 0] = torch.tensor([-200.0, float(logit_of(0.25))])
    pool.add(torch.nn.Identity(), (features,), maps)
    assert pool.mean() == pytest.approx([(0.5 * 1 + 0.25 * 3) / 0.75])


LABEL = WeakLabel("easy0", Lobe.RUL, 22, SliceConvention.ZERO_AT_FEET, source="reader, row 2")
PLACED = replace(LABEL, slice_number=None, slice_convention=None, z_lps_mm=-178.0)


def test_records_are_put_in_words_as_they_were_written():
    assert said(LABEL) == "the right upper lobe, slice 22"
    assert said(PLACED) == "the right upper lobe, z -178 mm"
    assert said(WeakLabel("a")) == "a nodule somewhere"
    study = Study("easy0", None, "p")
    told = told_by(Records((LABEL,)), [WeakStudy(study, (PLACED,))])
    assert told == {"easy0": Told((PLACED,), ("the right upper lobe, slice 22",))}


def test_a_record_is_weighed_against_the_proposals_of_the_scan(detector, scan):
    """The sphere lies at -178 mm, but for the lobe model not in the right upper lobe."""
    (clear,) = score_scan(detector, scan, Told((replace(PLACED, lobe=None),), ("x",))).records
    (doubtful,) = score_scan(detector, scan, Told((PLACED,), ("x",))).records
    assert 0 <= clear.entropy < doubtful.entropy
    assert 0 <= clear.missed < 0.1 < doubtful.missed
    assert score_scan(detector, scan, Told((), ())).records == ()


class CountingDetector(Detector):
    looks = 0

    def propose(self, scan):
        self.looks += 1
        return super().propose(scan)


@pytest.fixture
def counting() -> CountingDetector:
    return CountingDetector.load(SHIPPED, "cpu")


def test_a_scan_is_looked_at_once_until_it_or_its_records_change(counting, easy_studies, tmp_path):
    studies = []
    for item in easy_studies[:2]:
        path = shutil.copy(item.study.path, tmp_path)
        studies.append(replace(item.study, path=type(item.study.path)(path)))
    broken = Study("broken", tmp_path / "broken.nii.gz", "p")
    broken.path.write_bytes(b"no image")
    gone = Study("gone", tmp_path / "gone.nii.gz", "p")
    file, cache = tmp_path / "model.jsonl", ScanCache(tmp_path / "cache")

    def look(*which, told=None):
        found = gather(counting, which, told or {}, EvidenceFile(file), cache, flip=False)
        return {study.series_uid: one for study, one in found}

    first = look(studies[0], broken, gone)
    assert counting.looks == 1
    assert "broken.nii.gz: file: expected a readable" in first["broken"]
    assert "gone.nii.gz" in first["gone"]
    assert not (tmp_path / "cache").exists()  # prepared scans are not kept for this

    again = look(studies[0], broken)
    assert counting.looks == 1
    assert again["broken"] == first["broken"]
    for name in ("proposals", "mirrored", "features"):
        np.testing.assert_array_equal(getattr(again["easy0"], name), getattr(first["easy0"], name))

    look(*studies)  # a scan has arrived
    assert counting.looks == 2
    told = {"easy0": Told((PLACED,), ("x",))}
    assert look(*studies, told=told)["easy0"].records is not None
    assert counting.looks == 3
    assert look(*studies, told=told)["easy0"].records[0].says == "x"
    assert counting.looks == 3
    shutil.copy(easy_studies[2].study.path, studies[1].path)  # another image
    look(*studies, told=told)
    assert counting.looks == 4


def test_half_a_line_of_a_killed_process_costs_one_scan(counting, easy_studies, tmp_path):
    studies = [item.study for item in easy_studies[:3]]
    file, cache = tmp_path / "model.jsonl", ScanCache(tmp_path / "cache")

    def look():
        return list(gather(counting, studies, {}, EvidenceFile(file), cache, flip=False))

    look()
    content = file.read_bytes()
    file.write_bytes(content[:-200])
    assert len(look()) == 3 and counting.looks == 4
    look()
    assert counting.looks == 4
    for line in file.read_text().splitlines():
        if line != content[:-200].decode().splitlines()[-1]:
            json.loads(line)


def test_whatever_goes_wrong_with_one_scan_the_others_are_looked_at(
    counting, easy_studies, tmp_path, monkeypatch
):
    propose = CountingDetector.propose

    def fail(self, scan):
        if scan.series_uid == "easy0":
            raise MemoryError
        return propose(self, scan)

    monkeypatch.setattr(CountingDetector, "propose", fail)
    studies = [item.study for item in easy_studies[:2]]
    known = EvidenceFile(tmp_path / "model.jsonl")
    found = [one for _, one in gather(counting, studies, {}, known, ScanCache(tmp_path))]
    assert found[0] == "MemoryError" and isinstance(found[1], ScanEvidence)


# --- tables and the command line


def test_a_ranking_comes_back_from_its_table(tmp_path):
    ranking = rank("box_entropy", [seen("a", 0.5), seen("b")], failed=[("c", 'no "image", sorry')])
    write_ranking(tmp_path / "ranking.csv", ranking)
    back = read_ranking(tmp_path / "ranking.csv")
    assert [(one.series_uid, one.rank, one.why) for one in back] == [
        (one.series_uid, one.rank, one.why) for one in ranking
    ]
    assert back[0].score == pytest.approx(ranking[0].score, rel=1e-5)
    assert back[2].score is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seriesuid,score\na,1\n", "header: expected seriesuid,rank,score,why"),
        ("seriesuid,rank,score,why\na,first,1,\n", "row 2: fields: expected a line of a ranking"),
        ("seriesuid,rank,score,why\na,1\n", "row 2: fields"),
    ],
)
def test_a_table_that_is_no_ranking_is_refused(tmp_path, text, message):
    (tmp_path / "ranking.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_ranking(tmp_path / "ranking.csv")


def test_rank_on_the_command_line(easy_studies, tmp_path, capsys):
    folder = tmp_path / "studies"
    folder.mkdir()
    for item in easy_studies[:4]:
        shutil.copy(item.study.path, folder)
    (folder / "broken.nii.gz").write_bytes(b"no image")
    fingerprint = load_model(SHIPPED)[1].weights_fingerprint
    write_annotations(tmp_path / "labelled.csv", {"easy3": [Nodule((0, 0, 0), 8)]})
    (tmp_path / "weak_labels.csv").write_text(
        "seriesuid,lobe,slice_number,slice_convention,z_lps_mm,diameter_mm,attenuation,source\n"
        "easy1,RUL,22,zero_at_feet,,,,\n"
        "nobody,RUL,22,zero_at_feet,,,,\n"
    )
    command = ["rank", "--model", str(SHIPPED), "--studies", str(folder)]
    command += ["--annotations", str(tmp_path / "labelled.csv"), "--out", str(tmp_path / "out.csv")]
    command += ["--weak-labels", str(tmp_path / "weak_labels.csv"), "--strategy", "em_entropy"]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "3 scans by em_entropy" in told.out
    assert "broken.nii.gz" in told.err and "nobody" in told.err
    ranking = read_ranking(tmp_path / "out.csv")
    assert [one.series_uid for one in ranking][0] == "easy1"
    assert "the record names the right upper lobe, slice 22" in ranking[0].why
    assert {one.series_uid for one in ranking[1:3]} == {"easy0", "easy2"}
    assert ranking[3].series_uid == "broken" and ranking[3].score is None
    evidence = tmp_path / "out.evidence" / f"{fingerprint}.jsonl"
    lines = evidence.read_text()
    assert main(command) == 1
    assert evidence.read_text() == lines  # nothing was looked at twice
    assert read_ranking(tmp_path / "out.csv") == ranking


def test_rank_says_what_is_wrong(easy_studies, tmp_path, capsys):
    command = ["rank", "--out", str(tmp_path / "out.csv"), "--model"]
    studies = ["--studies", str(easy_studies[0].study.path)]
    assert main([*command, str(tmp_path / "none.pt"), *studies]) == 2
    assert "none.pt: model: expected a published model" in capsys.readouterr().err
    (tmp_path / "all.csv").write_text("seriesuid\neasy0\n")
    model = str(SHIPPED)
    assert main([*command, model, *studies, "--series", str(tmp_path / "all.csv")]) == 2
    assert "scans: expected at least one that is not labelled" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command, model, *studies, "--strategy", "best"])
    assert not (tmp_path / "out.csv").exists()
