"""Tables of weak labels, the NLST's and our own, and the audit of all sources."""

from __future__ import annotations

import io

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from deepem.errors import InputError
from deepem.geometry import RAS_TO_LPS, Grid
from deepem.nodule import CleanStatement, Lobe, SliceConvention, WeakLabel
from deepem.tables import WEAK_LABEL_COLUMNS, write_weak_labels
from deepem.weak_labels import (
    Records,
    ScanSlices,
    audit,
    check,
    read_nlst,
    read_nlst_series,
    read_weak_labels,
    render,
)

HEAD = SliceConvention.ONE_AT_HEAD
HEADER = ",".join(WEAK_LABEL_COLUMNS) + "\n"
NLST_HEADER = (
    "PID,STUDY_YR,SCT_AB_DESC,SCT_EPI_LOC,SCT_SLICE_NUM,SCT_LONG_DIA,SCT_PERP_DIA,SCT_MARGINS,"
    "SCT_PRE_ATT\n"
)
SERIES = {("100012", "0"): "1.2", ("100012", "1"): "1.3"}


@pytest.fixture
def table(tmp_path):
    def write(text, name="w.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attenuation": "Solid"}, r"attenuation: expected one of \('solid', .* got 'Solid'"),
        ({"margin": "sharp"}, r"margin: expected one of \('smooth', .* got 'sharp'"),
        ({"series_number": 2}, "series_number: expected only with dicom_instance, got None"),
        ({"sop_instance_uid": "1", "z_lps_mm": 2.0}, "z_lps_mm: expected .*, got more than one"),
    ],
)
def test_words_of_a_weak_label_are_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        WeakLabel("1.2", **fields)


def test_a_clean_statement_names_its_series():
    with pytest.raises(ValueError, match="series_uid: expected a name"):
        CleanStatement("")


def test_what_is_written_is_read_with_its_row(tmp_path):
    path = tmp_path / "w.csv"
    dicom = SliceConvention.DICOM_INSTANCE
    write_weak_labels(
        path,
        [
            WeakLabel("1.2", Lobe.LINGULA, 12, HEAD, None, 6.5, "solid", "r.txt[1:5]"),
            WeakLabel("1.3", z_lps_mm=-101.5, margin="spiculated"),
            WeakLabel("1.3", slice_number=7, slice_convention=dicom, series_number=203),
            WeakLabel("1.4"),
            WeakLabel("1.4", sop_instance_uid="1.4.77"),
        ],
        [CleanStatement("1.5", "r2.txt[0:9]")],
    )
    records = read_weak_labels(path)
    assert records.labels == (
        WeakLabel(
            "1.2", Lobe.LINGULA, 12, HEAD, None, 6.5, "solid", f"{path}, row 2: r.txt[1:5]"
        ),
        WeakLabel("1.3", z_lps_mm=-101.5, margin="spiculated", source=f"{path}, row 3"),
        WeakLabel("1.3", slice_number=7, slice_convention=dicom, series_number=203,
                  source=f"{path}, row 4"),
        WeakLabel("1.4", source=f"{path}, row 5"),
        WeakLabel("1.4", sop_instance_uid="1.4.77", source=f"{path}, row 6"),
    )  # fmt: skip
    assert records.clean == (CleanStatement("1.5", f"{path}, row 7: r2.txt[0:9]"),)
    assert (records.rejected, records.others) == ((), 0)
    assert records.series == ["1.2", "1.3", "1.4", "1.5"]


def test_a_number_without_convention_is_undeclared(table):
    (label,) = read_weak_labels(table(HEADER + "1.2,rul,12.0,,,,,\n")).labels
    assert (label.lobe, label.slice_number) == (Lobe.RUL, 12)
    assert label.slice_convention is SliceConvention.UNDECLARED


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (",RUL,,,,,,", "seriesuid: expected a series UID, got nothing"),
        ("1.2,RULL,,,,,,", "lobe: expected one of RUL, RML, RLL, LUL, lingula, LLL, 'no nodules', "
                           "or nothing, got RULL"),
        ("1.2,None,,,,,,", "lobe: .* got None"),
        ("1.2,,3.5,one_at_head,,,,", "slice_number: expected a whole number from 0, got 3.5"),
        ("1.2,,-3,one_at_head,,,,", "slice_number: expected a whole number from 0, got -3"),
        ("1.2,,x,one_at_head,,,,", "slice_number: expected a whole number from 0, got x"),
        ("1.2,,0,one_at_head,,,,", "slice_number: expected a whole number from 1, got 0"),
        ("1.2,,,one_at_head,,,,", "slice_number: expected a number in the convention one_at_head"),
        ("1.2,,3,head,,,,", "slice_convention: expected one of dicom_instance, .* got head"),
        ("1.2,,3,one_at_head,-5,,,", "z_lps_mm: expected nothing beside slice_number 3, got -5"),
        ("1.2,,,,nan,,,", "z_lps_mm: expected a finite number, got nan"),
        ("1.2,,,,,0,,", r"diameter_mm: expected a number of mm in \(0, 100\], got 0"),
        ("1.2,,,,,five,,", "diameter_mm: expected a finite number, got five"),
        ("1.2,,,,,,dense,", "attenuation: expected one of solid, .* got dense"),
        ("1.2,no nodules,,,,5,,", "diameter_mm: expected nothing beside 'no nodules', got 5"),
        ("1.2,,,,,,,,,", "fields: expected at most 8, got 10"),
    ],
)  # fmt: skip
def test_a_bad_row_is_rejected_and_the_rest_goes_on(table, row, message):
    records = read_weak_labels(table(HEADER + "a,RUL,,,,,,\n" + row + "\nb,LLL,,,,,,\n"))
    assert [label.series_uid for label in records.labels] == ["a", "b"]
    (error,) = records.rejected
    with pytest.raises(InputError, match=rf"w\.csv, row 3: {message}"):
        raise error


def test_extra_columns_are_checked_as_well(table):
    columns = HEADER.strip() + ",margin,series_number,sop_instance_uid\n"
    path = table(columns + "a,,,,,,,,sharp,\na,,3,one_at_head,,,,,,2\na,,,,-5.0,,,,,,1.2.3\n")
    assert [str(error).split("row ")[1] for error in read_weak_labels(path).rejected] == [
        "2: margin: expected one of smooth, lobulated, spiculated, poorly_defined, got sharp",
        "3: series_number: expected nothing without a dicom_instance, got 2",
        "4: sop_instance_uid: expected nothing beside another slice, got 1.2.3",
    ]


def test_a_table_with_other_columns_is_refused(table):
    with pytest.raises(InputError, match="header: expected the columns slice_number, slice_conv"):
        read_weak_labels(table("seriesuid,lobe\na,RUL\n"))
    with pytest.raises(InputError, match="header: expected every column once, got lobe repeated"):
        read_weak_labels(table("Lobe," + HEADER))
    with pytest.raises(InputError, match="got no such file"):
        read_weak_labels("none.csv")


def test_nlst_nodules(table):
    path = table(
        NLST_HEADER
        + "100012,0,51,1,26,8,6,1,1\n"
        + "100012.0,1.0,51.0,5.0,60.0,7.0,.M,9,3\n"
        + "100012,0,52,1,30,3,3,2,1\n"
        + "100012,0,53,6,70,9,9,2,1\n"
        + "100012,0,51,6,80,,,,\n"
    )
    records = read_nlst(path, SERIES)
    assert records.labels == (
        WeakLabel("1.2", Lobe.RUL, 26, HEAD, None, 7, "solid", f"{path}, row 2", "spiculated"),
        WeakLabel("1.3", Lobe.LINGULA, 60, HEAD, None, 7, "part_solid", f"{path}, row 3"),
        WeakLabel("1.2", Lobe.LLL, 80, HEAD, source=f"{path}, row 6"),
    )
    assert (records.rejected, records.others) == ((), 2)


@pytest.mark.parametrize("code", "123456")
def test_nlst_lobes(table, code):
    path = table(NLST_HEADER + f"100012,0,51,{code},26,8,6,1,1\n")
    expected = dict(zip("123456", ["RUL", "RML", "RLL", "LUL", "lingula", "LLL"], strict=True))
    assert read_nlst(path, SERIES).labels[0].lobe.value == expected[code]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("100012,0,51,1,999,8,6,1,1", "sct_slice_num: .*999 stands for missing.*, got 999"),
        ("100012,0,51,1,,8,6,1,1", "sct_slice_num: expected a slice number .* got nothing"),
        ("100012,0,51,1,0,8,6,1,1", "sct_slice_num: expected a whole number from 1, got 0"),
        ("100012,0,51,8,26,8,6,1,1", "sct_epi_loc: expected a lobe from 1 to 6, got 8"),
        ("100012,0,51,.M,26,8,6,1,1", "sct_epi_loc: expected a lobe from 1 to 6, got nothing"),
        ("100012,0,62,,,,,,", "sct_ab_desc: expected 51, one nodule with its place, got 62"),
        ("100012,0,,1,26,8,6,1,1", "sct_ab_desc: expected a code, got nothing"),
        ("100012,2,51,1,26,8,6,1,1", "pid: expected a series for pid 100012, study_yr 2, got none"),
        ("100012,0,51,1,26,180,6,1,1", r"sct_long_dia: expected a number of mm in \(0, 100\]"),
        ("100012,0,51,1,26,8,6,5,1", "sct_margins: expected one of 1, 2, 3, 9, got 5"),
        ("100012,0,51,1,26,8,6,1,5", "sct_pre_att: expected one of 1, 2, 3, 4, 6, 7, 9, got 5"),
    ],
)
def test_nlst_rows_that_cannot_be_used(table, row, message):
    records = read_nlst(table(NLST_HEADER + row + "\n100012,0,51,1,26,8,6,1,1\n"), SERIES)
    assert len(records.labels) == 1
    (error,) = records.rejected
    with pytest.raises(InputError, match=rf"w\.csv, row 2: {message}"):
        raise error


def test_nlst_series(table):
    assert read_nlst_series(table("pid,study_yr,seriesuid\n100012,0,1.2\n100012,1,1.3\n")) == SERIES
    for rows, message in [
        ("1,0,a\n1,0,b\n", "row 3: pid: expected every study once, got 1, 0"),
        ("1,0,\n", "row 2: seriesuid: expected a series UID, got nothing"),
        (",0,a\n", "row 2: pid: expected an ID, got nothing"),
        ("1,0,a,b\n", "row 2: fields: expected at most 3, got 4"),
    ]:
        with pytest.raises(InputError, match=message):
            read_nlst_series(table("pid,study_yr,seriesuid\n" + rows))


def hundred_slices(uid):
    return ScanSlices(f"{uid}.nii.gz", uid, Grid(np.diag([1.0, 1, 2, 1]), (10, 20, 100)))


def head(uid, lobe, number, source="s"):
    return WeakLabel(uid, lobe, number, HEAD, source=source)


def test_the_audit_counts_and_compares():
    bad = InputError("w.csv, row 9", "lobe", "a lobe", "x")
    sources = {
        "w.csv": Records(
            (
                head("a", Lobe.RUL, 20, "one"),
                head("a", Lobe.RUL, 21, "two"),
                head("a", Lobe.RUL, 23, "three"),
                head("a", Lobe.LUL, 20),
                head("b", Lobe.RUL, 20),
                head("b", None, 101, "far"),
                head("missing", Lobe.RUL, 20),
            ),
            (CleanStatement("b"), CleanStatement("c"), CleanStatement("gone")),
            (bad,),
        ),
        "r": Records(
            (WeakLabel("a", Lobe.LLL), WeakLabel("b", Lobe.RUL, z_lps_mm=161.0, source="z"))
        ),
    }
    result = audit(sources, {uid: hundred_slices(uid) for uid in "abc"})
    assert result.by_lobe == {
        "RUL": 6, "RML": 0, "RLL": 0, "LUL": 1, "lingula": 0, "LLL": 1, "unknown": 1
    }  # fmt: skip
    # Slice n of 100 lies at (100 - n + 0.5) / 100; z 161 between slice 20 (z 160) and 19.
    assert set(result.heights) == {"RUL", "LUL"}
    heights = [0.805, 0.795, 0.775, 0.805, 0.81]
    assert result.heights["RUL"] == pytest.approx(np.percentile(heights, (25, 50, 75)))
    assert result.heights["LUL"] == pytest.approx((0.805, 0.805, 0.805))
    pairs = [(one.source, other.source) for one, other in result.duplicates]
    assert pairs == [("one", "two"), ("s", "z")]
    assert result.missing == ("missing", "gone")
    assert result.contradictions == ("b",)
    assert (result.labelled, result.clean, result.scans) == (3, 3, 3)
    assert result.direction is None
    assert result.rejected[0] is bad
    assert str(result.rejected[1]).startswith("far: slice_number: expected 1 to 100")
    assert len(result.rejected) == 2


def test_the_audit_shows_the_direction_of_undeclared_numbers():
    labels = [
        WeakLabel("a", Lobe.RUL, 20, SliceConvention.UNDECLARED, source=f"row {n}") for n in "123"
    ]
    scans = {"a": hundred_slices("a")}
    result = audit({"w.csv": Records(tuple(labels))}, scans)
    assert (result.direction.for_head, result.rejected) == (3, ())
    result = audit({"w.csv": Records(tuple(labels[:1]))}, scans)
    assert (result.direction.for_head, len(result.rejected)) == (1, 1)
    assert "1 labels: " in printed(result)


def printed(result):
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(render(result))
    return console.file.getvalue()


def test_check_reads_every_source_and_says_it_all(tmp_path, table):
    hu = np.full((10, 20, 100), -800, np.int16)
    for uid in ("1.2", "1.4", "unnamed"):
        image = nib.Nifti1Image(hu, RAS_TO_LPS @ np.diag([1.0, 1, 2, 1]))
        nib.save(image, tmp_path / f"{uid}.nii.gz")
    (tmp_path / "1.3.nii.gz").write_bytes(b"broken")
    reports = tmp_path / "reports"
    reports.mkdir()
    (reports / "1.4.txt").write_text("No pulmonary nodules.")
    sources = {
        "weak_labels": table(HEADER + "1.2,RUL,27,one_at_head,,,,\n1.2,[x],,,,,,\n"),
        "nlst": table(NLST_HEADER + "100012,0,51,1,26,,,,\n100012,1,51,6,99,,,,\n", "n.csv"),
        "nlst_series": table("pid,study_yr,seriesuid\n100012,0,1.2\n100012,1,1.3\n", "s.csv"),
        "reports": reports,
    }
    bad = []
    result = check(tmp_path, on_bad=bad.append, **sources)
    assert ["1.3.nii.gz" in str(error) for error in bad] == [True]
    assert (result.scans, result.labelled, result.clean) == (2, 2, 1)
    assert result.missing == ("1.3",)
    assert len(result.duplicates) == 1
    lines = printed(result).splitlines()
    assert any(line.split()[1::2][:5] == ["RUL", "2", "0.74", "0.74", "0.74"] for line in lines)
    assert "2 labelled and 1 clean series, 2 of them here" in lines
    at = lines.index("missing scans: 1")
    assert lines[at + 1] == "  1.3"
    assert "duplicates: 1" in lines and "labelled and called clean: 0" in lines
    assert "rejected: 1" in lines and "got [x]" in printed(result)
    with pytest.raises(InputError, match=r"1\.3\.nii\.gz: file: expected a readable NIfTI"):
        check(tmp_path, **sources)
    with pytest.raises(InputError, match="series: expected a table pid,study_yr,seriesuid"):
        check(tmp_path, nlst=sources["nlst"])
