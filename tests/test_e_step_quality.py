"""The E-step on phantoms with a real detector: every factor must earn its place."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

from deepem.labelled import weak_studies
from deepem.model import load_model
from deepem.network import fused
from deepem.phantom import write_phantoms
from deepem.rounds import propose_all, to_rows
from deepem.scan import ScanCache
from deepem.weak_labels import read_weak_labels

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "apps/deepem_app/model/pretrained_nodule_detection.pt"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Hit, miss and null of every label, for all variants of the benchmark."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts" / "benchmarks")
        benchmark = importlib.import_module("e_step_quality")
        study = importlib.import_module("em_study")
    folder = tmp_path_factory.mktemp("quality")
    write_phantoms(folder / "phantoms", 14, 4321)
    hidden = study.marked(folder / "phantoms")
    studies = {item.study.series_uid: item.study for item in hidden}
    weak, rejected = weak_studies(
        read_weak_labels(folder / "phantoms" / "weak_labels.csv"), studies
    )
    assert not rejected
    cache, cpu = ScanCache(folder / "cache"), torch.device("cpu")
    rows = {
        item.study.series_uid: to_rows(found)
        for item, found in propose_all(fused(load_model(SHIPPED)[0]), weak, cache, cpu, -3.0)
    }
    return {
        variant.name: {
            key: np.array(values)
            for key, values in benchmark.quality(weak, hidden, rows, cache, variant, 0).items()
        }
        for variant in benchmark.VARIANTS
    }


def right(found):
    return found["right"].mean()


def test_slice_and_lobe_lift_the_share_of_right_picks(measured):
    alone, with_slice, with_lobe, both = (
        right(measured[name])
        for name in ("detector alone", "+ slice", "+ lobe", "slice and lobe (paper)")
    )
    assert len(measured["detector alone"]["right"]) >= 20
    assert alone + 0.1 < min(with_slice, with_lobe) and both >= max(with_slice, with_lobe) - 0.05
    assert both > alone + 0.25


def test_no_pick_is_right_without_a_proposal(measured):
    for found in measured.values():
        assert not (found["right"] > found["proposed"]).any()


def test_the_null_hypothesis_gives_up_on_the_wrong_ones_first(measured):
    plain, null = measured["slice and lobe (paper)"], measured["paper + null"]
    used = null["null"] < 0.5
    assert 0.5 < used.mean() < 1
    assert null["right"][used].mean() > plain["right"].mean()


def test_wrong_lobes_cost_less_with_the_null_hypothesis_and_the_noise_model(measured):
    paper = measured["20 % wrong lobes: paper"]
    modelled = measured["20 % wrong lobes: all + noise model"]
    assert right(paper) < right(measured["slice and lobe (paper)"])
    assert right(modelled) >= right(measured["20 % wrong lobes: all"])
