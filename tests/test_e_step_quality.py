"""The E-step against a real detector's proposals: every factor must earn its place.

data/proposals.csv is what a network proposed that had seen four marked phantoms for 1200 steps:

    deepem phantom --out P --count 18 --seed 4321
    deepem detect --model WARM_START --out tests/data/proposals.csv P

It misses a third of the nodules, as detectors do when the first round of EM begins.
"""

import importlib
import pickle
from pathlib import Path

import numpy as np
import pytest

from deepem.labelled import weak_studies
from deepem.phantom import write_phantoms
from deepem.rounds import to_rows
from deepem.scan import ScanCache
from deepem.tables import read_predictions
from deepem.weak_labels import read_weak_labels

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Hit, miss and null of every label, for all variants of the benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS.parent / "scripts" / "benchmarks")
        benchmark = importlib.import_module("e_step_quality")
        study = importlib.import_module("em_study")
    folder = tmp_path_factory.mktemp("quality")
    write_phantoms(folder / "phantoms", 18, 4321)
    hidden = study.marked(folder / "phantoms")
    studies = {item.study.series_uid: item.study for item in hidden}
    weak, rejected = weak_studies(
        read_weak_labels(folder / "phantoms" / "weak_labels.csv"), studies
    )
    assert not rejected
    proposals = read_predictions(TESTS / "data" / "proposals.csv")
    assert set(proposals) == set(studies)
    rows = {item.study.series_uid: to_rows(proposals[item.study.series_uid]) for item in weak}
    cache = ScanCache(folder / "cache")
    return {
        variant.name: {
            key: np.array(values)
            for key, values in benchmark.quality(weak, hidden, rows, cache, variant, 0).items()
        }
        for variant in benchmark.VARIANTS
    }


def right(found):
    return found["right"].mean()


def test_the_record_lifts_the_share_of_right_picks(measured):
    alone, paper = measured["detector alone"], measured["slice and lobe (paper)"]
    assert len(alone["right"]) >= 30
    assert right(paper) > right(alone) + 0.1
    assert right(paper) > 0.8 * paper["proposed"].mean()  # of what can be right at all


def test_no_pick_is_right_without_a_proposal(measured):
    for found in measured.values():
        assert not (found["right"] > found["proposed"]).any()


def test_the_null_hypothesis_gives_up_on_the_wrong_ones_first(measured):
    plain, null = measured["slice and lobe (paper)"], measured["paper + null"]
    used = null["used"] > 0
    assert 0.5 < used.mean() < 1
    assert null["right"][used].mean() > right(plain) + 0.05


def test_a_certain_guess_is_right_more_often(measured):
    """By their odds half of the labels have a clear favourite, by the probability hardly any."""
    plain, odds = measured["paper + null"], measured["paper + null + odds, certain"]
    certain = odds["used"] > 0
    assert 0.4 < certain.mean() < (plain["used"] > 0).mean()
    assert odds["right"][certain].mean() > odds["right"].mean() + 0.1
    assert certain.sum() > (plain["posterior"] > 0.5).sum() + 2


def test_wrong_records_cost_and_the_noise_model_gives_some_of_it_back(measured):
    paper, all_ = measured["slice and lobe (paper)"], measured["20 % wrong lobes: all"]
    assert right(measured["20 % wrong lobes: paper"]) < right(paper)
    assert right(measured["slices off by 5 mm: paper"]) < right(paper)
    assert right(measured["20 % wrong lobes: all + noise model"]) > right(all_)
    off = "slices off by 10 mm: all"
    assert right(measured[f"{off} + noise model"]) > right(measured[off]) + 0.05


def test_arms_of_the_robustness_study_reach_other_processes():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TESTS.parent / "scripts" / "benchmarks")
        study = importlib.import_module("em_robustness")
        arms = [arm for arms in study.CURVES.values() for arm in arms.values()]
        assert [arm.name for arm in pickle.loads(pickle.dumps(arms))] == [arm.name for arm in arms]
