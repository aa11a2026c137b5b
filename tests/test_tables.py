"""Tables in and out, and the files under them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepem.errors import InputError
from deepem.files import atomic_path, write_json
from deepem.nodule import Lobe, Nodule, Proposal, SliceConvention, WeakLabel
from deepem.tables import (
    PREDICTION_COLUMNS,
    TYPICAL_DIAMETER_MM,
    WEAK_LABEL_COLUMNS,
    read_annotations,
    read_excluded,
    read_patients,
    read_predictions,
    read_series,
    write_annotations,
    write_predictions,
    write_weak_labels,
)

HEADER = "seriesuid,coordX,coordY,coordZ,diameter_mm\n"
PREDICTIONS = "seriesuid,coordX,coordY,coordZ,probability\n"


@pytest.fixture
def table(tmp_path):
    """Writes a text or bytes to a file and gives its path."""

    def write(content: str | bytes) -> Path:
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def test_annotations_by_series_in_file_order(table):
    path = table(HEADER + "b,1,-2,3.5,4\na,0,0,0,5\nb,9,9,9,6\n")
    assert read_annotations(path) == {
        "b": [Nodule((1, -2, 3.5), 4), Nodule((9, 9, 9), 6)],
        "a": [Nodule((0, 0, 0), 5)],
    }


def test_bom_crlf_blank_lines_extra_and_reordered_columns_are_fine(table):
    text = "\ufeffdiameter_mm,seriesuid,note,coordZ,coordY,coordX\r\n\r\n4,007,x,3,2,1\r\n\r\n"
    assert read_annotations(table(text)) == {"007": [Nodule((1, 2, 3), 4)]}


@pytest.mark.parametrize("read", [read_annotations, read_excluded])
def test_a_header_alone_is_an_empty_table(table, read):
    assert read(table(HEADER)) == {}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,1,,3,4", r"table\.csv, row 3: coordY: expected a finite number, got nothing"),
        ("a,1,2", r"row 3: diameter_mm: expected .*, got nothing"),
        ("a,1,2,nan,4", r"row 3: coordZ: expected a finite number, got nan"),
        ("a,-inf,2,3,4", r"row 3: coordX: expected a finite number, got -inf"),
        ("a,1,2,three,4", r"row 3: coordZ: expected a finite number, got three"),
        ("a,1,2,3,0", r"row 3: diameter_mm: expected a number of mm in \(0, 100\], got 0"),
        ("a,1,2,3,-1", r"row 3: diameter_mm: .* got -1"),
        ("a,1,2,3,101", r"row 3: diameter_mm: .* got 101"),
        (",1,2,3,4", r"row 3: seriesuid: expected a series UID, got nothing"),
        ("a,1,2,3,4,5,6", r"row 3: fields: expected at most 5, got 7"),
        ('"a,1,2,3,4', r"file: expected a CSV file, got "),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_text(table, row, message):
    with pytest.raises(InputError, match=message):
        read_annotations(table(HEADER + "a,1,2,3,4\n" + row + "\n"))


def test_blank_lines_count_as_lines(table):
    with pytest.raises(InputError, match="row 5: coordX: .* got x"):
        read_annotations(table("\n" + HEADER.replace("\n", "\n\n") + "a,1,2,3,4\na,x,2,3,4\n"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected a CSV file, got an empty file"),
        (b"\n \n", "expected a CSV file, got an empty file"),
        (b"seriesuid,coordX,coordY,coordZ,diameter_mm\n\x00\x01,1,2,3,4\n", "binary data"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "expected a CSV file, got .*decode"),
        (b"seriesuid,coordY,x\n", "header: expected the columns coordX, coordZ, diameter_mm, got"),
        (
            b"seriesuid,coordX,coordX,coordY,coordZ,diameter_mm\n",
            "header: expected every column once, got coordX repeated",
        ),
    ],
)
def test_a_file_that_is_no_such_table(table, content, message):
    with pytest.raises(InputError, match=message):
        read_annotations(table(content))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(InputError, match=r"none\.csv: file: expected a CSV file, got no such file"):
        read_annotations(tmp_path / "none.csv")
    with pytest.raises(InputError, match="expected a readable CSV file, got Is a directory"):
        read_annotations(tmp_path)


def test_excluded_without_size_are_10_mm_wide(table):
    path = table(HEADER + "a,1,2,3,-1\na,1,2,3,5.5\n")
    assert [nodule.diameter_mm for nodule in read_excluded(path)["a"]] == [10, 5.5]
    with pytest.raises(InputError, match="row 2: diameter_mm: expected -1 or a number .* got -2"):
        read_excluded(table(HEADER + "a,1,2,3,-2\n"))


def test_predictions_without_diameter_get_the_typical_one(table):
    (proposal,) = read_predictions(table(PREDICTIONS + "a,1,2,3,0.25\n"))["a"]
    assert proposal.nodule == Nodule((1, 2, 3), TYPICAL_DIAMETER_MM)
    assert proposal.logit == pytest.approx(math.log(1 / 3))


def test_predictions_with_diameter_need_it_in_every_row(table):
    columns = ",".join(PREDICTION_COLUMNS) + "\n"
    with pytest.raises(InputError, match="row 3: diameter_mm: .* got nothing"):
        read_predictions(table(columns + "a,1,2,3,0.5,7\na,1,2,3,0.5,\n"))


@pytest.mark.parametrize("text", ["1.0001", "-0.1", "nan", "high"])
def test_a_probability_outside_0_to_1_is_refused(table, text):
    with pytest.raises(InputError, match=f"row 2: probability: expected .*, got {text}"):
        read_predictions(table(PREDICTIONS + f"a,1,2,3,{text}\n"))


def test_order_and_ties_of_probabilities_survive_as_logits(table):
    texts = ["1", "0.9999999999999999", "0.999999", "0.5", "0.5", "1e-9", "1e-300", "5e-324", "0"]
    path = table(PREDICTIONS + "".join(f"a,1,2,3,{text}\n" for text in texts))
    proposals = read_predictions(path)["a"]
    logits = [proposal.logit for proposal in proposals]
    assert [a == b for a, b in zip(logits, logits[1:], strict=False)] == [
        a == b for a, b in zip(texts, texts[1:], strict=False)
    ]
    assert logits == sorted(logits, reverse=True)
    assert [proposals[0].probability, proposals[-1].probability] == [1.0, 0.0]


@given(st.lists(st.integers(0, 10**9), min_size=2, max_size=30))
def test_nine_digits_of_probability_always_keep_their_order(tmp_path_factory, billionths):
    path = tmp_path_factory.mktemp("p") / "p.csv"
    path.write_text(PREDICTIONS + "".join(f"a,1,2,3,{n / 1e9:.9f}\n" for n in billionths))
    logits = [proposal.logit for proposal in read_predictions(path)["a"]]
    by_logit = sorted(range(len(logits)), key=logits.__getitem__)
    assert [billionths[n] for n in by_logit] == sorted(billionths)
    assert len(set(logits)) == len(set(billionths))


def test_written_predictions_are_best_first_and_read_back(tmp_path):
    worse = Proposal(Nodule((0.1, -0.2, 1 / 3), 5.5), -2.125)
    better = Proposal(Nodule((1, 2, 3), 7), 3.0)
    path = tmp_path / "new" / "p.csv"
    write_predictions(path, {"1.10": [worse, better], "empty": []})
    first, *rows = path.read_text().splitlines()
    assert first == "seriesuid,coordX,coordY,coordZ,probability,diameter_mm"
    assert [row.split(",")[0] for row in rows] == ["1.10", "1.10"]
    again = read_predictions(path)["1.10"]
    assert [proposal.nodule for proposal in again] == [better.nodule, worse.nodule]
    assert [proposal.logit for proposal in again] == pytest.approx([3.0, -2.125], abs=1e-12)


def test_annotations_round_trip_with_every_digit(tmp_path):
    annotations = {"1.2": [Nodule((1 / 3, -2e-7, 1e3), math.pi)], "0": [Nodule((1, 2, 3), 4)]}
    write_annotations(tmp_path / "a.csv", annotations)
    assert read_annotations(tmp_path / "a.csv") == annotations


@pytest.mark.parametrize("text", ["seriesuid\n1.2\n\n007\n", "1.2\n007\n", "\ufeff1.2\r\n007\r\n"])
def test_series_with_and_without_header(table, text):
    assert read_series(table(text)) == ["1.2", "007"]


def test_series_may_be_empty_but_not_double_and_not_a_wide_table(table):
    assert read_series(table("seriesuid\n")) == []
    with pytest.raises(InputError, match="row 3: seriesuid: expected every series once, got a"):
        read_series(table("a\nb\na\n"))
    with pytest.raises(InputError, match="expected one series UID per line, got 2 columns"):
        read_series(table("a,b\n"))


def test_patients(table):
    assert read_patients(table("patient_id,seriesuid\n0063,1.2\n")) == {"1.2": "0063"}
    with pytest.raises(InputError, match="row 3: patient_id: expected an ID, got nothing"):
        read_patients(table("seriesuid,patient_id\na,p\nb,\n"))
    with pytest.raises(InputError, match="row 3: seriesuid: expected every series once, got a"):
        read_patients(table("seriesuid,patient_id\na,p\na,q\n"))


def test_weak_labels_leave_unknown_fields_empty(tmp_path):
    path = tmp_path / "weak.csv"
    labels = [
        WeakLabel(
            "1.2", Lobe.LINGULA, 12, SliceConvention.ONE_AT_HEAD, None, 6.5, "solid", "r.txt"
        ),
        WeakLabel("1.3", z_lps_mm=-101.5),
    ]
    write_weak_labels(path, iter(labels))
    assert path.read_text().splitlines() == [
        ",".join(WEAK_LABEL_COLUMNS),
        "1.2,lingula,12,one_at_head,,6.5,solid,r.txt",
        "1.3,,,,-101.5,,,",
    ]


def test_the_real_luna16_tables(real_data):
    annotations = read_annotations(real_data / "luna16/annotations.csv")
    assert (len(annotations), sum(map(len, annotations.values()))) == (601, 1186)
    excluded = read_excluded(real_data / "luna16/annotations_excluded.csv")
    assert sum(map(len, excluded.values())) == 35192
    assert len(read_series(real_data / "luna16/seriesuids.csv")) == 888


def test_an_interrupted_write_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "report.nii.gz"
    path.write_text("old")
    with pytest.raises(RuntimeError, match="disk"), atomic_path(path) as aside:
        assert aside.parent == path.parent and aside.name.endswith(".nii.gz")
        aside.write_text("half")
        raise RuntimeError("disk")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == [path.name]


def test_json_is_strict_and_whole(tmp_path):
    path = tmp_path / "deep" / "r.json"
    write_json(path, {"cpm": 0.5, "name": "ü"})
    assert json.loads(path.read_text(encoding="utf-8")) == {"cpm": 0.5, "name": "ü"}
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"cpm": math.nan})
    assert json.loads(path.read_text(encoding="utf-8"))["cpm"] == 0.5
