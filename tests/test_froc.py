"""The LUNA16 rules by hand, against a slow oracle, and on a real submission."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepem.froc import FP_RATES, bootstrap_cpm, evaluate, first_hit_fp_rates
from deepem.nodule import Nodule, Proposal
from deepem.tables import read_annotations, read_excluded, read_predictions, read_series

FAR = 500.0


def nodule(x: float, diameter_mm: float = 10.0) -> Nodule:
    return Nodule((x, 0, 0), diameter_mm)


def proposal(x: float, logit: float) -> Proposal:
    return Proposal(Nodule((x, 0, 0), 6.0), logit)


def test_froc_by_hand():
    # Two scans, three nodules. By falling score: hit, false, hit, false; one nodule is missed.
    froc = evaluate(
        {"a": [nodule(0), nodule(100)], "b": [nodule(0)]},
        {"a": [proposal(1, 4), proposal(FAR, 3)], "b": [proposal(1, 2), proposal(FAR, 1)]},
        ["a", "b"],
    )
    np.testing.assert_allclose(froc.curve_fp_per_scan, [0, 0, 0.5, 0.5, 1])
    np.testing.assert_allclose(froc.curve_sensitivity, np.array([0, 1, 1, 2, 2]) / 3)
    np.testing.assert_allclose(
        froc.curve_threshold, [np.inf, *(1 / (1 + np.exp(-np.array([4.0, 3, 2, 1]))))]
    )
    third = 1 / 3
    expected = [third, third, 2 * third, 2 * third, 2 * third, 2 * third, 2 * third]
    assert froc.sensitivity == pytest.approx(expected)
    assert froc.cpm == pytest.approx(12 / 21)
    assert (froc.nodules, froc.true_positives, froc.false_positives, froc.scans) == (3, 2, 2, 2)


def test_sensitivity_is_linear_between_points():
    # Equal scores enter together: from (0, 0) straight to 1 false positive per scan and all found.
    froc = evaluate({"a": [nodule(0)]}, {"a": [proposal(0, 1), proposal(FAR, 1)]}, ["a"])
    assert froc.sensitivity == pytest.approx([0.125, 0.25, 0.5, 1, 1, 1, 1])


def test_a_step_exactly_on_a_rate_is_decided_by_the_challenge_s_rounding():
    # 7 scans, 7 false positives before the hit: a step at rate 1. Of 25 in all, 7 / 25 * 25 / 7 is
    # a hair above 1, so the step is not reached; of 16 in all it is exactly 1, so it is.
    assert 7 / 25 * 25 / 7 > 1 == 7 / 16 * 16 / 7
    for false_positives, at_rate_1 in [(25, 0), (16, 1)]:
        scores = [10 - n for n in range(false_positives)]
        marks = [proposal(FAR, score) for score in scores] + [proposal(0, 3.5)]
        froc = evaluate({"0": [nodule(0)]}, {"0": marks}, list("0123456"))
        assert froc.sensitivity[FP_RATES.index(1)] == pytest.approx(at_rate_1, abs=1e-12)


@pytest.mark.parametrize(("distance", "found"), [(4.999, 1), (5.0, 0), (5.001, 0)])
def test_only_strictly_inside_the_radius_is_a_hit(distance, found):
    froc = evaluate({"a": [nodule(0, 10)]}, {"a": [proposal(distance, 0)]}, ["a"])
    assert (froc.true_positives, froc.false_positives) == (found, 1 - found)


def test_distance_is_taken_along_all_three_axes():
    at = Proposal(Nodule((3, 4, 12), 6), 0)
    for diameter, found in [(26, 0), (26.001, 1)]:
        froc = evaluate({"a": [Nodule((0, 0, 0), diameter)]}, {"a": [at]}, ["a"])
        assert froc.true_positives == found


def test_further_hits_are_ignored_and_the_highest_score_counts():
    proposals = [proposal(1, -1), proposal(FAR, 2), proposal(2, 3), proposal(-1, 0)]
    froc = evaluate({"a": [nodule(0)]}, {"a": proposals}, ["a"])
    assert (froc.true_positives, froc.false_positives, froc.double_hits) == (1, 1, 2)
    assert froc.cpm == 1  # 3 stands before the false positive at 2


def test_one_proposal_may_find_two_nodules():
    froc = evaluate({"a": [nodule(0), nodule(4)]}, {"a": [proposal(2, 0)]}, ["a"])
    assert (froc.true_positives, froc.double_hits, froc.false_positives) == (2, 0, 0)


def test_excluded_findings_are_neither_true_nor_false_and_nodules_come_first():
    # 0: nodule inside an excluded finding; 50: excluded alone; 100: nothing.
    froc = evaluate(
        {"a": [nodule(0)]},
        {"a": [proposal(0, 1), proposal(51, 2), proposal(100, 0)]},
        ["a"],
        excluded={"a": [nodule(0, 20), nodule(50), nodule(52)], "z": [nodule(100)]},
    )
    assert froc.ignored_excluded == 1
    assert (froc.nodules, froc.true_positives, froc.false_positives) == (1, 1, 1)
    assert froc.cpm == 1  # the excluded one ranked first and cost nothing


def test_the_cap_keeps_only_scores_above_the_first_one_past_it():
    falling = [proposal(FAR, logit) for logit in (5, 4, 3, 3, 3, 1)]
    assert evaluate({}, {"a": falling}, ["a"], max_marks=2).candidates_kept == 2
    assert evaluate({}, {"a": falling}, ["a"], max_marks=3).candidates_kept == 2
    assert evaluate({}, {"a": falling}, ["a"], max_marks=5).candidates_kept == 5
    assert evaluate({}, {"a": falling}, ["a"], max_marks=6).candidates_kept == 6
    same = [proposal(FAR, 0)] * 101
    assert evaluate({}, {"a": same}, ["a"]).candidates_kept == 0
    assert evaluate({}, {"a": same[:100]}, ["a"]).candidates_kept == 100


def test_scans_without_candidates_still_count_and_other_scans_do_not():
    predictions = {"a": [proposal(FAR, 1)], "other": [proposal(FAR, 2)]}
    annotations = {"a": [nodule(0)], "other": [nodule(0)]}
    froc = evaluate(annotations, predictions, ["a", "b", "c", "d"])
    assert (froc.scans, froc.nodules, froc.false_positives) == (4, 1, 1)
    assert froc.curve_fp_per_scan[-1] == 0.25


def test_no_predictions_at_all_is_zero():
    froc = evaluate({"a": [nodule(0)]}, {}, ["a"])
    assert froc.sensitivity == (0.0,) * 7
    assert (froc.cpm, froc.candidates_kept, froc.nodules) == (0, 0, 1)
    assert first_hit_fp_rates({"a": [nodule(0)]}, {}, ["a"]) == {"a": [None]}


def test_without_nodules_there_is_no_sensitivity_but_false_positives_count():
    froc = evaluate({}, {"a": [proposal(0, 1)]}, ["a", "b"])
    assert math.isnan(froc.cpm) and all(map(math.isnan, froc.sensitivity))
    assert (froc.nodules, froc.false_positives) == (0, 1)
    report = json.loads(json.dumps(froc.report(), allow_nan=False))
    assert report["cpm"] is None and report["sensitivity"] == [None] * 7
    assert report["false_positives"] == 1
    interval = bootstrap_cpm({}, {}, ["a", "b"], rng=np.random.default_rng(0))
    assert all(map(math.isnan, interval))


@pytest.mark.parametrize(
    ("series", "max_marks", "message"),
    [
        ([], 100, "series: expected at least one scan, got none"),
        (["a", "a"], 100, "series: expected every scan once"),
        (["a"], 0, "max_marks: expected 1 or more, got 0"),
    ],
)
def test_what_cannot_be_evaluated(series, max_marks, message):
    with pytest.raises(ValueError, match=message):
        evaluate({}, {}, series, max_marks=max_marks)


def test_the_price_of_every_nodule():
    rates = first_hit_fp_rates(
        {"a": [nodule(100), nodule(0)], "b": [nodule(0)]},
        {"a": [proposal(0, 1), proposal(FAR, 2), proposal(FAR, 1)], "b": [proposal(0, 3)]},
        ["a", "b", "c", "d"],
    )
    assert rates == {"a": [None, 0.5], "b": [0.0], "c": [], "d": []}


def slow(annotations, predictions, series, excluded, max_marks):
    """The rules once more, one proposal at a time: counts, then the curve from its definition."""

    def hit(finding, mark):
        squares = zip(finding.center_lps_mm, mark.nodule.center_lps_mm, strict=True)
        return sum((a - b) ** 2 for a, b in squares) < (finding.diameter_mm / 2) ** 2

    found, false, ignored, doubles, kept, nodules = [], [], 0, 0, 0, 0
    for uid in series:
        marks = sorted(predictions.get(uid, []), key=lambda mark: -mark.logit)
        if len(marks) > max_marks:
            marks = [mark for mark in marks if mark.logit > marks[max_marks].logit]
        kept += len(marks)
        for truth in annotations.get(uid, []):
            nodules += 1
            scores = [mark.logit for mark in marks if hit(truth, mark)]
            doubles += max(len(scores) - 1, 0)
            found += [max(scores)] if scores else []
        for mark in marks:
            if any(hit(truth, mark) for truth in annotations.get(uid, [])):
                continue
            if any(hit(other, mark) for other in excluded.get(uid, [])):
                ignored += 1
            else:
                false.append(mark.logit)
    curve = [
        (sum(s >= t for s in false) / len(series), sum(s >= t for s in found) / nodules)
        for t in [math.inf, *sorted({*found, *false}, reverse=True)]
    ]
    return (nodules, len(found), len(false), ignored, doubles, kept), np.array(curve).T


whole = st.integers(-8, 8).map(float)  # a coarse grid: touching spheres, ties, steps on a rate
findings = st.builds(Nodule, st.tuples(whole, whole, st.just(0.0)), st.sampled_from([4.0, 10.0]))
marks = st.builds(Proposal, findings, st.integers(-5, 5).map(float))
SERIES = ["a", "b", "c"]
scenes = st.tuples(
    st.dictionaries(st.sampled_from([*SERIES, "x"]), st.lists(findings, max_size=4)),
    st.dictionaries(st.sampled_from([*SERIES, "x"]), st.lists(marks, max_size=9)),
    st.dictionaries(st.sampled_from(SERIES), st.lists(findings, max_size=4)),
)


@settings(max_examples=200, deadline=None)
@given(scenes, st.integers(1, 9))
def test_it_agrees_with_the_rules_taken_one_by_one(scene, max_marks):
    annotations, predictions, excluded = scene
    annotations = {**annotations, "a": [*annotations.get("a", []), nodule(0)]}
    froc = evaluate(annotations, predictions, SERIES, excluded, max_marks)
    counts, (rate, sensitivity) = slow(annotations, predictions, SERIES, excluded, max_marks)
    assert counts == (
        froc.nodules,
        froc.true_positives,
        froc.false_positives,
        froc.ignored_excluded,
        froc.double_hits,
        froc.candidates_kept,
    )
    np.testing.assert_allclose(froc.curve_fp_per_scan, rate)
    np.testing.assert_allclose(froc.curve_sensitivity, sensitivity)
    assert (np.diff(froc.sensitivity) >= 0).all()
    assert froc.sensitivity[0] >= 0 and froc.sensitivity[-1] <= sensitivity[-1]


@settings(max_examples=50, deadline=None)
@given(scenes)
def test_a_false_positive_below_all_others_only_lengthens_the_curve(scene):
    annotations, predictions, excluded = scene
    annotations = {**annotations, "a": [*annotations.get("a", []), nodule(0)]}
    before = evaluate(annotations, predictions, SERIES, excluded)
    worse = {**predictions, "a": [*predictions.get("a", []), proposal(FAR, -9)]}
    after = evaluate(annotations, worse, SERIES, excluded)
    assert after.false_positives == before.false_positives + 1
    np.testing.assert_allclose(after.curve_fp_per_scan[:-1], before.curve_fp_per_scan)
    np.testing.assert_array_equal(after.curve_sensitivity[:-1], before.curve_sensitivity)
    assert after.curve_sensitivity[-1] == before.curve_sensitivity[-1]


@settings(max_examples=50, deadline=None)
@given(scenes)
def test_only_the_order_of_scores_matters(scene):
    annotations, predictions, excluded = scene
    bent = {
        uid: [Proposal(mark.nodule, mark.logit**3 / 7 + 1) for mark in found]
        for uid, found in predictions.items()
    }
    before = evaluate(annotations, predictions, SERIES, excluded, 5)
    after = evaluate(annotations, bent, SERIES, excluded, 5)
    assert before.candidates_kept == after.candidates_kept
    np.testing.assert_array_equal(before.sensitivity, after.sensitivity)


def resampled_cpm(annotations, predictions, series, drawn):
    """CPM of a bootstrap sample made literally: every drawn scan copied under a new name."""
    names = [f"{n}" for n in range(len(drawn))]
    return evaluate(
        {name: annotations.get(series[n], []) for name, n in zip(names, drawn, strict=True)},
        {name: predictions.get(series[n], []) for name, n in zip(names, drawn, strict=True)},
        names,
    ).cpm


def test_bootstrap_gives_the_quantiles_of_literally_resampled_scans(rng):
    series = [f"s{n}" for n in range(12)]
    annotations = {uid: [nodule(0), nodule(50)][: n % 3] for n, uid in enumerate(series)}
    predictions = {
        uid: [proposal(x, rng.normal(x < 60)) for x in (0, 50, 200, 300)] for uid in series
    }
    low, high = bootstrap_cpm(
        annotations, predictions, series, rng=np.random.default_rng(1), resamples=400
    )
    times = np.random.default_rng(1).multinomial(12, np.full(12, 1 / 12), 400)
    cpm = [
        resampled_cpm(annotations, predictions, series, np.repeat(np.arange(12), row))
        for row in times
    ]
    assert (low, high) == pytest.approx(np.quantile(cpm, [0.025, 0.975]), abs=1e-12)
    assert low < evaluate(annotations, predictions, series).cpm < high


def test_the_real_submission_scores_what_the_challenge_says(real_data):
    folder = real_data / "luna16_submission_fold9"
    annotations = read_annotations(real_data / "luna16/annotations.csv")
    predictions = read_predictions(folder / "submission_official_uids.csv")
    series = read_series(folder / "seriesuids_fold9.csv")
    excluded = read_excluded(real_data / "luna16/annotations_excluded.csv")
    froc = evaluate(annotations, predictions, series, excluded)
    official = [0.676190, 0.752381, 0.828571, 0.885714, 0.923810, 0.933333, 0.933333]
    assert froc.fp_per_scan == FP_RATES
    np.testing.assert_allclose(froc.sensitivity, official, atol=1e-6)
    assert froc.cpm == pytest.approx(0.847619, abs=1e-6)
    assert sum(map(len, predictions.values())) == 1790
    assert (froc.candidates_kept, froc.ignored_excluded, froc.double_hits) == (1750, 277, 17)
    assert (froc.nodules, froc.true_positives, froc.false_positives) == (105, 98, 1358)
    assert froc.scans == 88
    prices = first_hit_fp_rates(annotations, predictions, series, excluded)
    found = [rate for rates in prices.values() for rate in rates if rate is not None]
    assert len(found) == 98
    assert sum(rate <= 1 for rate in found) == 93  # 93 of 105 is .885714
    low, high = bootstrap_cpm(
        annotations, predictions, series, excluded, rng=np.random.default_rng(0)
    )
    assert 0.65 < low < froc.cpm < high < 1
