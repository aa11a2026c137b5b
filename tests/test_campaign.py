"""The sums of the campaign benchmark by hand, and its report from made-up rounds."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "scripts" / "benchmarks"


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
