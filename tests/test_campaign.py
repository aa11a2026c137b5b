"""The sums of the campaign benchmark by hand, and its report from made-up rounds."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

from deepem.tables import write_annotations

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "scripts" / "benchmarks"
SHIPPED = ROOT / "apps" / "deepem_app" / "model" / "pretrained_nodule_detection.pt"


@pytest.fixture(scope="module")
def campaign():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("campaign")
    finally:
        sys.path.remove(str(BENCHMARKS))


def test_area_is_the_mean_over_the_labels(campaign):
    assert campaign.area([(4, 0.2), (10, 0.4), (12, 0.4)]) == pytest.approx((6 * 0.3 + 0.8) / 8)


def test_labels_needed_lie_on_the_line_between_two_rounds(campaign):
    curve = [(4, 0.2), (10, 0.4), (16, 0.3)]
    assert campaign.labels_needed(curve, 0.3) == pytest.approx(7)
    assert campaign.labels_needed(curve, 0.1) == 4
    assert campaign.labels_needed(curve, 0.5) is None


def test_a_campaign_on_folders_runs_to_its_report(campaign, easy_studies, tmp_path):
    """LUNA16's tables beside the scans, patients apart, from a model that is there."""
    annotations = {item.study.series_uid: item.nodules for item in easy_studies}
    write_annotations(tmp_path / "annotations.csv", annotations)
    source = campaign.Source(
        tmp_path / "work", easy_studies[0].study.path.parent, tmp_path / "annotations.csv"
    )
    size = campaign.Size(pool=4, start=1, per_round=1, rounds=2, validation=1, test=1, steps=1)
    cast = campaign.cast_of(source, size, 0)
    start = source.work / "seed0" / "start"
    start.mkdir(parents=True)
    shutil.copy(SHIPPED, start / "model.pt")
    froc = {"cpm": 0.1, "scans": 1, "nodules": 2}
    report = {"labelled": cast.start, "nodules": 2, "test": froc}
    (start / "result.json").write_text(json.dumps(report))
    results = {
        (name, 0): campaign.run_campaign(source, size, 0, name)
        for name in ("foreground", "shuffle")
    }
    for rounds in results.values():
        assert [len(one["labelled"]) for one in rounds] == [1, 2, 3]
        assert [one["nodules"] for one in rounds] == [2, 4, 6]
        assert {*rounds[-1]["labelled"]} < {item.study.series_uid for item in cast.pool}
    seen = [{item.study.series_uid for item in role}
            for role in (cast.pool, cast.validation, cast.test)]  # fmt: skip
    assert [len(role) for role in seen] == [4, 1, 1] and len(set.union(*seen)) == 6
    again = campaign.run_campaign(source, size, 0, "shuffle")  # nothing is done twice
    assert again == results["shuffle", 0]
    campaign.write_report(tmp_path, size, results)
    assert "not measured" in (tmp_path / "campaign.md").read_text()
    assert (tmp_path / "campaign.png").is_file()


def test_the_report_compares_with_both_baselines_by_seed(campaign, tmp_path):
    def rounds(*cpm):
        return [{"labelled": ["x"] * (4 + 6 * at), "nodules": at, "test": {
            "cpm": one, "scans": 40, "nodules": 70}} for at, one in enumerate(cpm)]  # fmt: skip

    results = {}
    for seed in range(3):
        noise = 0.05 * seed
        results["shuffle", seed] = rounds(0.2 + noise, 0.3 + noise, 0.3 + noise)
        results["foreground", seed] = rounds(0.2 + noise, 0.4 + noise, 0.4 + noise)
        results["hybrid", seed] = rounds(0.2 + noise, 0.4 + noise, 0.4 + noise)
        results[campaign.FULL, seed] = rounds(0.2 + noise, 0.4 + noise, 0.4 + noise)
    campaign.write_report(tmp_path, campaign.Size(), results)
    content = json.loads((tmp_path / "campaign.json").read_text())
    assert content["gains"]["hybrid"]["shuffle"] == pytest.approx([0.075] * 3)
    assert content["gains"]["hybrid"]["foreground"] == pytest.approx([0, 0, 0])
    text = (tmp_path / "campaign.md").read_text()
    assert "| hybrid | 0.250 | 0.450 | 0.450 | 0.400 | +0.075 (+0.075 to +0.075) |" in text
    assert (tmp_path / "campaign.png").is_file()
