"""A round of EM: what the E-step of many scans leaves for the M-step to train on."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from deepem.em import PAPER, EmConfig, e_step
from deepem.errors import InputError
from deepem.geometry import Grid
from deepem.labelled import WeakStudy
from deepem.lungs import Lungs
from deepem.network import PRESETS, NoduleNet
from deepem.nodule import Lobe, Nodule, Proposal, WeakLabel
from deepem.observation import LOBES, SliceModel
from deepem.patches import LabelledScan, PatchSampler
from deepem.rounds import (
    Explained,
    certain_ones,
    drawn,
    first_model,
    from_rows,
    propose_all,
    refitted,
    summary,
    taught,
    to_rows,
)
from deepem.scan import Scan, ScanCache
from deepem.volume import Study

SHAPE = (96, 96, 96)


def blank_scan(image=None):
    grid = Grid.axis_aligned(np.array([-48.0, -48.0, -100.0]), 1.0, SHAPE)
    low, high = grid.to_world(np.zeros(3)), grid.to_world(np.array(SHAPE) - 1)
    lungs = Lungs(np.ones(SHAPE, bool), grid, low, high, found=True)
    if image is None:
        image = np.zeros(SHAPE, np.uint8)
    return Scan("s", image, grid, lungs, "")


def explained(log_weight, chosen, labels=None, null=0.0):
    """Proposals at x = -40, -20, ... on one line, with the given log weights for each label."""
    log_weight = np.array(log_weight, float)
    proposals = tuple(
        Proposal(Nodule((-40 + 20 * at, 0, -50), 8), 0.0) for at in range(log_weight.shape[1])
    )
    log_null = math.log(null) if null else -np.inf
    posterior = e_step(np.zeros(len(proposals)), log_weight, log_null=log_null)
    labels = labels or [WeakLabel("s", Lobe.RUL, z_lps_mm=-50.0)] * len(log_weight)
    study = WeakStudy(Study("s", None, "p"), tuple(labels))
    return Explained(blank_scan(), study, proposals, posterior, chosen)


THREE = np.log([[0.7, 0.28, 0.02]])


def test_map_of_the_paper_teaches_its_choice_and_spares_what_else_it_might_have_been():
    item = taught(explained(THREE, [[0]]), PAPER)
    assert [n.center_lps_mm[0] for n in item.nodules] == [-40, -20]
    assert (item.weights, item.doubts) == ((1.0, 0.0), (0.0, 0.0))
    assert item.patient_id == "p"


def test_only_what_no_label_can_mean_is_taught_to_be_none():
    item = taught(explained(THREE, [[0]]), EmConfig())
    assert (item.weights, item.doubts) == ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0))


def test_a_second_proposal_in_a_possible_nodule_is_not_taught_to_be_none():
    item = explained(THREE, [[0]])
    nested = Proposal(Nodule((-42, 0, -50), 4), 0.0)  # in the first, of 8 mm at -40
    item = taught(replace(item, proposals=(*item.proposals[:2], nested)), EmConfig())
    assert (item.weights, item.doubts) == ((1.0, 0.0), (0.0, 0.0))


def test_sampling_teaches_the_mean_over_its_draws():
    config = replace(PAPER, method="sampling")
    assert taught(explained(THREE, [[0, 1]]), config).weights == (0.5, 0.5)
    assert taught(explained(THREE, [[1, 1]]), config).weights == (0.0, 1.0)
    assert taught(explained(THREE, [[1]]), config).weights == (0.0, 0.5)  # one draw on the null


def test_soft_teaches_the_posterior_and_no_proposal_more_than_once():
    config = EmConfig(method="soft")
    item = taught(explained(THREE, [[0, 1, 2]]), config)
    assert item.weights == pytest.approx((0.7, 0.28, 0.02)) and item.doubts == (0, 0, 0)
    twice = taught(explained(np.repeat(THREE, 2, 0), [[0, 1, 2], [0, 1, 2]]), config)
    assert twice.weights == pytest.approx((1.0, 0.56, 0.04))


def test_an_unexplained_label_teaches_nothing_false():
    item = taught(explained(THREE - 20, [[]], null=0.1), PAPER)
    assert not item.nodules and len(item.unsure_z_lps_mm) == 1


def test_in_the_paper_background_is_unsure_near_every_slice_and_everywhere_without_one():
    labels = [WeakLabel("s", z_lps_mm=-50.0), WeakLabel("s", z_lps_mm=-20.0)]
    log_weight = np.repeat(THREE, 2, 0)
    item = taught(explained(log_weight, [[0], [0]], labels), replace(PAPER, clearance_mm=10))
    assert item.unsure_z_lps_mm == ((-60.0, -40.0), (-30.0, -10.0))
    coarse = replace(PAPER, clearance_mm=10, slice_off_mm=4)
    item = taught(explained(THREE, [[0]], labels[:1]), coarse)
    assert item.unsure_z_lps_mm == ((-68.0, -32.0),)
    item = taught(explained(THREE, [[0]], [WeakLabel("s", Lobe.RUL)]), PAPER)
    assert item.unsure_z_lps_mm == ((-math.inf, math.inf),)


def test_around_a_nodule_that_is_known_the_rest_is_background():
    labels = [WeakLabel("s", z_lps_mm=-50.0), WeakLabel("s", z_lps_mm=-20.0)]
    config = EmConfig(clearance_mm=10)
    unknown = [[-9.0, -9.0, -9.0]]  # three equals: none has half of the second label
    item = explained(np.concatenate([THREE, unknown]), [[0], []], labels)
    assert taught(item, config).unsure_z_lps_mm == ((-30.0, -10.0),)


def test_a_young_detector_teaches_its_best_guesses_alone():
    weak_guess = np.log([[0.3, 0.25, 0.25]])  # and 0.2 for the null hypothesis
    scans = [explained(THREE, [[0]])]  # .7
    scans += [explained(weak_guess - at / 10, [[0]], null=0.2) for at in range(9)]
    assert [item.chosen for item in certain_ones(scans[:3], 0.5)] == [[[0]], [[]], [[]]]
    assert [item.chosen for item in certain_ones(scans, 0.5)] == [[[0]]] * 3 + [[[]]] * 7
    against_the_null = [replace(item, chosen=[[]]) for item in scans]
    assert [item.chosen for item in certain_ones(against_the_null, 0.9)] == [[[0]]] * 3 + [[[]]] * 7
    nothing = [explained(THREE - 90, [[]], null=1.0)]  # and no weight at all is no guess
    assert certain_ones(nothing, 0.5)[0].chosen == [[]] or nothing[0].posterior.posterior.any()


def test_nothing_is_taught_to_be_none_where_a_nodule_is_unknown():
    far, near = (explained(THREE - 20, [[]], [WeakLabel("s", z_lps_mm=z)], null=0.1)
                 for z in (-80.0, -50.0))  # fmt: skip
    config = EmConfig(clearance_mm=10)
    assert taught(far, config).doubts == (1, 1, 1) and taught(near, config).doubts == ()


def test_a_clean_scan_is_background_everywhere():
    nothing = explained(np.empty((0, 3)), [], labels=None)
    item = taught(nothing, EmConfig())
    assert item.weights == (0, 0, 0) and item.doubts == (1, 1, 1) and not item.unsure_z_lps_mm
    assert not taught(nothing, PAPER).nodules


def sampler_of(scan, edge=48, seed=0):
    return PatchSampler([scan], NoduleNet(PRESETS["slim"]), edge, seed=seed)


def test_no_negative_lies_where_nobody_knows():
    """The unsure range is painted bright: whatever flip and zoom, no negative cell is bright."""
    image = np.zeros(SHAPE, np.uint8)
    image[:, :, 30:51] = 255  # z from -70 to -50
    scan = LabelledScan(blank_scan(image), (), unsure_z_lps_mm=((-70.0, -50.0),))
    seen = np.zeros(2, int)
    for patch in sampler_of(scan).batch(0, 60):
        negative = np.zeros(5 * 12**3, bool)
        negative[patch.targets.negative] = True
        bright = patch.x[0].unfold(0, 4, 4).unfold(1, 4, 4).unfold(2, 4, 4).mean((3, 4, 5))
        inside, outside = bright.flatten().numpy() > 0.9, bright.flatten().numpy() < 0.3
        assert not negative.reshape(5, -1)[:, inside].any()
        assert negative.reshape(5, -1)[:, outside].mean() > 0.9
        seen += inside.any(), outside.any()
    assert (seen > 20).all()


def test_a_possible_nodule_is_neither_positive_nor_negative():
    nodule = Nodule((0, 0, -50), 10)
    scans = [
        LabelledScan(blank_scan(), nodules, weights=weights, doubts=doubts)
        for nodules, weights, doubts in [
            ((nodule,), (1.0,), (0.0,)),
            ((nodule,), (0.0,), (1.0,)),
            ((nodule,), (0.0,), (0.0,)),
            ((), (), ()),
        ]
    ]
    sure, rejected, possible, absent = (
        [sampler_of(scan, edge=64).batch(step, 1)[0].targets for step in range(12)]
        for scan in scans
    )
    assert sum(target.weight.sum() for target in sure) > 0
    assert sum(target.doubt.sum() for target in rejected) > 0
    assert not sum(len(target.positive) for target in [*possible, *absent])
    negatives = [sum(len(t.negative) for t in targets) for targets in (possible, absent)]
    assert negatives[0] < negatives[1]


def test_a_nodule_of_a_quarter_of_the_weight_has_a_quarter_of_the_crops():
    nodules = (Nodule((-30, 0, -50), 8), Nodule((30, 0, -50), 8))
    scan = LabelledScan(blank_scan(), nodules, weights=(1.0, 0.25))
    seen = np.concatenate([
        np.unique(patch.targets.weight.numpy())
        for step in range(12)
        for patch in sampler_of(scan).batch(step, 8)
    ])  # fmt: skip
    assert sampler_of(scan)._chance.tolist() == pytest.approx([0.8, 0.2])
    assert set(seen.tolist()) == {0.25, 1.0}
    assert 0.55 < (seen == 1).mean() < 0.85  # also by chance, beside the other


def test_weights_are_validated():
    with pytest.raises(ValueError, match=r"weights: expected 1 in 0..1, got \[2.0\]"):
        LabelledScan(blank_scan(), (Nodule((0, 0, 0), 5),), weights=(2.0,))
    with pytest.raises(ValueError, match="weights: expected 0"):
        LabelledScan(blank_scan(), (), weights=(1.0,))


def test_every_round_draws_a_share_anew():
    weak = [WeakStudy(Study(f"s{at}", None, "p"), ()) for at in range(40)]
    config = EmConfig(scans_per_round=10)
    first, again, second = (drawn(weak, config, 0, number) for number in (1, 1, 2))
    assert first == again != second and len(first) == len(set(map(id, first))) == 10
    assert drawn(weak, EmConfig(), 0, 1) == weak


def test_the_lobe_model_learns_where_the_posterior_says_the_reported_lobe_is():
    """A patient whose nodules called LUL lie low: the model follows, by posterior."""
    labels = [WeakLabel("s", Lobe.LUL)]
    item = explained(np.log([[0.02, 0.9, 0.08]]), [[1]], labels)
    before = first_model(EmConfig())
    after = refitted(before, [item] * 200)
    at = item.scan.lungs.relative(
        np.array([proposal.nodule.center_lps_mm for proposal in item.proposals])
    )
    lul = LOBES.index(Lobe.LUL)
    gain = after.lobe.log_probability(at)[:, lul] - before.lobe.log_probability(at)[:, lul]
    assert gain[1] > 1
    nothing = refitted(before, [explained(THREE, [[0]], [WeakLabel("s", z_lps_mm=-50.0)])])
    p = np.exp(nothing.lobe.log_probability(at)), np.exp(before.lobe.log_probability(at))
    np.testing.assert_allclose(*p, atol=0.05)
    assert nothing.size == before.size


def test_the_size_model_learns_that_the_detector_sees_nodules_too_small():
    """Proposals of 8 mm, reported as 16 mm: a factor of two, less and less uncertain."""
    item = explained(np.log([[1.0, 1e-9]]), [[0]], [WeakLabel("s", diameter_mm=16.0)])
    after = refitted(first_model(EmConfig()), [item] * 500)
    assert math.exp(after.size.log_bias) == pytest.approx(2, abs=0.05) and after.size.spread < 0.15
    density = after.size.log_density(16.0, np.array([4.0, 8.0, 16.0]))
    assert density.argmax() == 1


def test_enough_marked_nodules_say_how_far_a_slice_may_be_off():
    diameters = np.linspace(4, 20, 40)
    fitted = first_model(EmConfig(), diameters).slice
    assert fitted.slack_mm == 2.0
    assert fitted.sigma_mm == pytest.approx(diameters.std() / 2)
    coarse = first_model(EmConfig(slice_off_mm=5.0), diameters).slice
    assert coarse.sigma_mm == pytest.approx(math.hypot(diameters.std() / 2, 5.0))
    assert first_model(EmConfig(), diameters[:10]).slice == SliceModel()


def test_a_nodule_is_taught_in_the_size_that_was_reported():
    labels = [WeakLabel("s", diameter_mm=16.0), WeakLabel("s")]
    item = explained(np.log([[0.9, 0.01], [0.01, 0.9]]), [[0], [1]], labels)
    sizes = [nodule.diameter_mm for nodule in taught(item, EmConfig(method="map")).nodules]
    assert sizes == [16, 8]
    own = taught(item, EmConfig(method="map", size=False)).nodules
    assert [nodule.diameter_mm for nodule in own] == [8, 8]


def test_the_summary_by_hand():
    named = [WeakLabel("s", Lobe.RUL, z_lps_mm=-50.0)]
    certain = explained(np.log([[1.0, 1e-300]]), [[0]], named)
    unexplained = explained(np.log([[0.025, 0.025]]), [[]], named, null=0.05)
    found = summary([certain, unexplained], first_model(EmConfig()))
    assert found["scans"] == found["labels"] == 2 and found["proposals_per_scan"] == 2
    assert found["unexplained"] == 0.5
    halves = 0.5 * math.log(2) + 2 * 0.25 * math.log(4)
    assert found["entropy"] == pytest.approx(halves / 2, abs=1e-4)
    assert found["evidence"] == pytest.approx((0 + math.log(0.1)) / 2, abs=1e-4)
    nothing = summary([], first_model(EmConfig()))
    assert nothing["labels"] == 0 and nothing["evidence"] is None


def test_rows_are_the_proposals_again():
    proposals = [Proposal(Nodule((1.5, -2, 3), 4.25), -1.75)]
    assert from_rows(to_rows(proposals)) == proposals


def test_a_scan_that_cannot_be_read_gives_its_error_and_the_others_their_proposals(
    easy_studies, tmp_path
):
    corrupt = tmp_path / "corrupt.nii.gz"
    corrupt.write_bytes(b"no image")
    studies = [easy_studies[0].study, Study("corrupt", corrupt, "x"), easy_studies[1].study]
    weak = [WeakStudy(study, ()) for study in studies]
    torch.manual_seed(0)
    net = NoduleNet(PRESETS["slim"])
    found = list(propose_all(net, weak, ScanCache(tmp_path / "c"), torch.device("cpu"), -10.0))
    assert [item.study.series_uid for item, _ in found] == ["easy0", "corrupt", "easy1"]
    assert isinstance(found[1][1], InputError) and str(corrupt) in str(found[1][1])
    assert found[0][1] and found[2][1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "best"}, r"method: expected one of \['map', 'sampling', 'soft'\], got 'best'"),
        ({"rounds": 0}, "rounds: expected 1 or more, got 0"),
        ({"warm_start": 1.0}, r"warm_start: expected a share in \[0, 1\), got 1.0"),
        ({"weak_share": 0.0}, r"weak_share: expected \(0, 1\], got 0.0"),
        ({"null": -1.0}, "null: expected 0 or more, got -1.0"),
        ({"null": math.nan}, "null: expected 0 or more, got nan"),
        ({"slice_off_mm": -1.0}, "slice_off_mm: expected 0 or more, got -1.0"),
    ],
)
def test_a_wrong_setting_says_what_was_expected(change, message):
    with pytest.raises(ValueError, match=message):
        replace(EmConfig(), **change)
