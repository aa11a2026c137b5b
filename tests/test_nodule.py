import math

import pytest

from deepem.nodule import Lobe, Nodule, Proposal, SliceConvention, WeakLabel


@pytest.mark.parametrize("diameter_mm", [0, -1, math.nan, math.inf, 100.1])
def test_a_diameter_is_positive_and_plausible(diameter_mm):
    with pytest.raises(ValueError, match=r"diameter_mm: expected \(0, 100\]"):
        Nodule((0, 0, 0), diameter_mm)


@pytest.mark.parametrize("center", [(0, 0), (0, math.nan, 0)])
def test_a_center_is_three_finite_numbers(center):
    with pytest.raises(ValueError, match="center_lps_mm: expected three finite numbers"):
        Nodule(center, 5)


def test_probability_is_the_logistic_and_never_overflows():
    nodule = Nodule((0, 0, 0), 5)
    assert Proposal(nodule, 0.0).probability == 0.5
    assert Proposal(nodule, math.log(3)).probability == pytest.approx(0.75)
    assert Proposal(nodule, -2000.0).probability == 0.0
    assert Proposal(nodule, 2000.0).probability == 1.0
    with pytest.raises(ValueError, match="logit: expected a finite number, got nan"):
        Proposal(nodule, math.nan)


def test_lobes_are_read_in_any_case_and_a_typo_names_the_choices():
    assert [Lobe.parse(text) for text in ("rul", " Lingula ")] == [Lobe.RUL, Lobe.LINGULA]
    with pytest.raises(ValueError, match=r"one of \['RUL', .*'LLL'\], got 'upper'"):
        Lobe.parse("upper")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"series_uid": ""}, "series_uid: expected a name"),
        ({"slice_number": 3}, "slice_convention: expected one exactly where"),
        (
            {"slice_number": -3, "slice_convention": SliceConvention.ONE_AT_HEAD},
            "0 or more, got -3",
        ),
        (
            {"slice_number": 3, "slice_convention": SliceConvention.ONE_AT_HEAD, "z_lps_mm": 1.0},
            "a slice number, a SOP instance UID or a z, got more than one",
        ),
        ({"z_lps_mm": math.inf}, "z_lps_mm: expected a finite number"),
        ({"diameter_mm": 0.0}, "diameter_mm: expected"),
    ],
)
def test_a_weak_label_that_contradicts_itself_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        WeakLabel(**({"series_uid": "1.2"} | fields))
