"""Reports in free text: every rule by example, every label back to its characters."""

from __future__ import annotations

import re

import pytest

from deepem.errors import InputError
from deepem.nodule import Lobe, SliceConvention
from deepem.weak_labels import parse_report, read_reports

RUL, RML, RLL, LUL, LINGULA, LLL = Lobe


def told(text):
    """(lobe, series, image, mm) of every label."""
    return [
        (label.lobe, label.series_number, label.slice_number, label.diameter_mm)
        for label in parse_report(text, "1.2", "r").labels
    ]


@pytest.mark.parametrize(
    "image",
    ["(203:162)", "[203:162]", "[203/162]", "series 203 image 162", "Series 203, image 162",
     "Se 203 Im 162", "(se. 203, im. 162)", "Se:203/Im:162", "image 162 of series 203",
     "(Series 203;\nimage 162)", "(203:160-164)"],
)  # fmt: skip
def test_image_references(image):
    text = f"There is a 5 mm nodule in the right upper lobe {image}."
    assert told(text) == [(RUL, 203, 162, 5)]
    (label,) = parse_report(text, "1.2", "r").labels
    assert label.slice_convention is SliceConvention.DICOM_INSTANCE


@pytest.mark.parametrize("image", ["image 162", "(im 162)", "slice #162", "on image number 162"])
def test_an_image_without_series(image):
    assert told(f"RUL nodule {image}.") == [(RUL, None, 162, None)]


@pytest.mark.parametrize("no_image", ["at 10:30", "(3/4)", "10:30:15", "on 3/4/2012"])
def test_times_and_dates_are_no_images(no_image):
    assert told(f"RUL nodule, 5 mm, reported {no_image}.") == [(RUL, None, None, 5)]


@pytest.mark.parametrize(
    ("words", "lobes"),
    [
        ("right upper lobe", [RUL]), ("RML", [RML]), ("right middle lobe", [RML]),
        ("middle lobe", [RML]), ("lower lobe of the right lung", [RLL]), ("rll", [RLL]),
        ("upper lobe of the left lung", [LUL]), ("left lower lobe", [LLL]), ("right apex", [RUL]),
        ("lingula", [LINGULA]), ("lingular segment of the left upper lobe", [LINGULA]),
        ("left upper lobe (lingula)", [LINGULA]), ("right upper and lower lobes", [RUL, RLL]),
        ("right upper, middle, and lower lobes", [RUL, RML, RLL]),
        ("right upper and left lower lobes", [RUL, LLL]),
        ("right upper lobe and left lower lobe", [RUL, LLL]),
        ("RUL, RML and in the LLL", [RUL, RML, LLL]), ("both upper lobes", [RUL, LUL]),
        ("lower lobes", [RLL, LLL]), ("anterior segment of the\nright upper lobe", [RUL]),
    ],
)  # fmt: skip
def test_lobes(words, lobes):
    assert [label[0] for label in told(f"Nodules in the {words}.")] == lobes


@pytest.mark.parametrize(
    ("words", "mm"),
    [
        ("5 mm", 5), ("5-mm", 5), ("0.7 cm", 7), ("5 x 4 mm", 4.5), ("5 mm x 4 mm", 4.5),
        ("1.2 × 0.6 cm", 9), ("6 by 4 by 2 mm", 4), ("3-4 mm", 3.5), ("6 mm, previously 4 mm", 6),
        ("6 mm (previously 4 x 3 mm)", 6), ("6 mm from 4 mm", 6), ("6 mm, was 4 mm", 6),
        ("increased from 4 to 6 mm", 6), ("increased from 4 mm to 6 mm", 6),
        ("6 mm compared to 4 mm", 6), ("increased by 2 mm", None), ("up to 6 mm", None),
        ("less than 4 mm", None), ("6 mm, 12 mm from the pleura", 6), ("on 1.25 mm slices", None),
        ("6 mm, 4 mm on the prior study", 6),
    ],
)  # fmt: skip
def test_sizes(words, mm):
    assert told(f"RUL nodule {words}.") == [(RUL, None, None, mm)]


def test_an_earlier_image_is_not_the_image():
    text = "No new nodules. RUL nodule 5 mm, previously 4 mm (5:33), now (3:45), without change."
    assert told(text) == [(RUL, 3, 45, 5)]


@pytest.mark.parametrize(
    ("words", "attenuation", "margin"),
    [
        ("solid", "solid", None), ("ground-glass", "ground_glass", None),
        ("ground glass and solid", "part_solid", None), ("part-solid", "part_solid", None),
        ("subsolid", "part_solid", None), ("mixed", "part_solid", None),
        ("non-solid", "ground_glass", None), ("pure GGO", "ground_glass", None),
        ("spiculated solid", "solid", "spiculated"), ("not spiculated", None, None),
        ("smooth", None, "smooth"), ("lobulated", None, "lobulated"),
        ("ill-defined", None, "poorly_defined"), ("well-circumscribed", None, "smooth"),
    ],
)  # fmt: skip
def test_attenuation_and_margin(words, attenuation, margin):
    (label,) = parse_report(f"A {words} nodule in the RUL.", "1.2", "r").labels
    assert (label.attenuation, label.margin) == (attenuation, margin)


def test_a_solid_component_is_not_the_size():
    (label,) = parse_report("Ground-glass nodule, 3 mm solid component, RML.", "1", "r").labels
    assert (label.attenuation, label.diameter_mm) == ("part_solid", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5 mm nodule in the right upper lobe (3:45) and 4 mm nodule in the LLL (3:120).",
         [(RUL, 3, 45, 5), (LLL, 3, 120, 4)]),
        ("In the RUL, a 5 mm nodule (3:45), and in the LLL a 4 mm nodule.",
         [(RUL, 3, 45, 5), (LLL, None, None, 4)]),
        ("RUL nodules measuring 4 mm (3:45) and 6 mm (3:60).",
         [(RUL, 3, 45, 4), (RUL, 3, 60, 6)]),
        ("4 mm (3:45) and 6 mm (3:60) nodules in the RUL.",
         [(RUL, 3, 45, 4), (RUL, 3, 60, 6)]),
        ("Right upper lobe: 5 mm nodule (3:45), 4 mm nodule (3:50).",
         [(RUL, 3, 45, 5), (RUL, 3, 50, 4)]),
        ("Nodule in the RUL (3:45) and 4 mm nodule (3:60).",
         [(RUL, 3, 45, None), (None, 3, 60, 4)]),
        ("Nodules in the RUL (3:45) and LLL (3:90).",
         [(RUL, 3, 45, None), (LLL, 3, 90, None)]),
        ("Nodules in the RUL (3:45, 3:90).", [(RUL, 3, 45, None), (RUL, 3, 90, None)]),
        ("Nodule in the RUL (3:45, 5:90).", [(RUL, 3, 45, None)]),  # seen in two planes
        ("Nodule in the RUL (3:45, 3:46).", [(RUL, 3, 45, None)]),  # seen in two slices
        ("RUL 5 mm nodule (3:45) LLL 4 mm nodule (3:60).",
         [(RUL, 3, 45, 5), (LLL, 3, 60, 4)]),
        ("Nodules in the RUL and LLL (3:45, 3:90).",
         [(RUL, 3, 45, None), (LLL, 3, 90, None)]),
        ("1. 4 mm RUL nodule (2:10)\n2. 8 mm LUL nodule (2:20)",
         [(RUL, 2, 10, 4), (LUL, 2, 20, 8)]),
        ("Bilateral nodules, the largest in the RUL measuring 8 mm (3:40).", [(RUL, 3, 40, 8)]),
        ("Right upper lobe 5 mm (203:162).", [(RUL, 203, 162, 5)]),  # no word needed
        ("Nodule in the RUL. It measures 5 mm (3:45).", [(RUL, 3, 45, 5)]),
        ("RUL nodule (3:45). The nodule at image 60 is 4 mm.",
         [(RUL, 3, 45, None), (None, None, 60, 4)]),
    ],
)  # fmt: skip
def test_several_nodules(text, expected):
    assert told(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "No nodule in the right upper lobe.",
        "There is no 3 mm or larger RUL abnormality and no nodule.",
        "Without evidence of pulmonary nodules in the RUL.",
        "The nodule in the RUL has resolved.",
        "RUL nodule (3:45). This has resolved.",
        "Resected RUL nodule.",
        "Status post right upper lobectomy.",
        "Enlarged lymph node next to the RUL, 12 mm (3:80).",
        "5 mm thyroid nodule (3:4).",
        "4 mm calcified granuloma in the RUL (3:45).",
        "5 mm RUL scar (3:45).",
        "Recommend CT for nodules of 6-8 mm in 12 months.",
        "HISTORY: 5 mm nodule in the RUL.\nTECHNIQUE: 5 mm nodule protocol, RUL.",
    ],
)
def test_what_is_no_nodule(text):
    records = parse_report(text, "1.2", "r")
    assert (records.labels, records.clean) == ((), ())
    (error,) = records.rejected
    assert re.match("r: text: expected a nodule, .* got neither", str(error))


@pytest.mark.parametrize(
    "text",
    [
        "No nodule in the right upper lobe, but a 5 mm nodule in the LLL (3:45).",
        "No pleural effusion, 5 mm nodule in the LLL (3:45).",
        "Without change, 5 mm LLL nodule (3:45).",
        "Status post RUL resection with 5 mm nodule in the LLL (3:45). No lymph nodes.",
        "5 mm LLL nodule (3:45), no lymphadenopathy. Adrenal nodule, 14 mm (3:200).",
        "A 5 mm nodule in the LLL (3:45) has not resolved.",
        "HISTORY: RUL nodule.\nFINDINGS:\nLungs: 5 mm LLL nodule (3:45).\n"
        "IMPRESSION: 5 mm LLL nodule.",
        "FINDINGS: see below.\nIMPRESSION:\n1. 5 mm LLL nodule (3:45).",
    ],
)
def test_a_nodule_beside_what_is_none(text):
    assert told(text) == [(LLL, 3, 45, 5)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("Heart normal. No pulmonary nodules. Liver normal.", "No pulmonary nodules."),
        ("Lungs: There are no lung nodules or masses.",
         "Lungs: There are no lung nodules or masses."),
        ("No focal consolidation, nodule or mass is identified.",
         "No focal consolidation, nodule or mass is identified."),
        ("There is no evidence of pulmonary nodules in either lung.",
         "There is no evidence of pulmonary nodules in either lung."),
    ],
)  # fmt: skip
def test_a_clean_report(text, sentence):
    records = parse_report(text, "1.2", "r")
    (clean,) = records.clean
    start, end = map(int, re.fullmatch(r"r\[(\d+):(\d+)\]", clean.source).groups())
    assert (clean.series_uid, text[start:end]) == ("1.2", sentence)
    assert (records.labels, records.rejected) == ((), ())


@pytest.mark.parametrize(
    "text",
    ["No new nodules.", "No suspicious nodules.", "No nodules larger than 4 mm.",
     "No other nodules.", "No nodules in the right lung.", "No enlarging pulmonary nodule."],
)  # fmt: skip
def test_a_limited_no_is_not_clean(text):
    records = parse_report(text, "1.2", "r")
    assert (records.labels, records.clean, len(records.rejected)) == ((), (), 1)


def test_a_report_that_contradicts_itself_is_told():
    records = parse_report("No pulmonary nodules. Multiple nodules.", "1.2", "r")
    assert (records.labels, records.clean) == ((), ())
    messages = "\n".join(map(str, records.rejected))
    assert "r[31:38]: place: expected a lobe, an image or a size" in messages
    assert "r[0:21]: no nodules: expected no other word on nodules" in messages
    records = parse_report("No pulmonary nodules. 5 mm nodule in the RUL.", "1.2", "r")
    assert (len(records.labels), len(records.clean)) == (1, 1)  # the audit tells of both


@pytest.mark.parametrize(
    ("text", "labels", "message"),
    [
        ("5 mm nodule in the left middle lobe.", 0, "lobe: expected one of RUL, .* got '5 mm nod"),
        ("120 mm mass in the RUL.", 0, r"size: expected a size in \(0, 100\] mm, got '120 mm"),
        ("Nodules in the RUL and LLL, the largest 8 mm (3:40).", 2,
         "image: expected one image for each of 2 lobes"),
    ],
)  # fmt: skip
def test_what_cannot_be_placed_is_rejected(text, labels, message):
    records = parse_report(text, "1.2", "r")
    assert len(records.labels) == labels
    assert {(label.slice_number, label.diameter_mm) for label in records.labels} <= {(None, None)}
    (error,) = records.rejected
    assert re.match(rf"r\[0:{len(text) - 1}\]: {message}", str(error))


def test_the_source_leads_back_to_the_characters():
    text = "Heart normal. A solid nodule in the RUL (3:45). It measures 5 mm.\n4 mm LLL nodule."
    first, second = parse_report(text, "1.2", "reports/1.2.txt").labels
    spans = [tuple(map(int, span)) for span in re.findall(r"\[(\d+):(\d+)\]", first.source)]
    assert first.source.startswith("reports/1.2.txt[")
    assert [text[a:b] for a, b in spans] == ["solid nodule in the RUL (3:45)", "5 mm"]
    assert second.source == "reports/1.2.txt[66:81]"
    assert text[66:81] == "4 mm LLL nodule"


def test_a_folder_of_reports(tmp_path):
    (tmp_path / "1.2.3.txt").write_text("5 mm nodule in the RUL (3:45).")
    (tmp_path / "1.2.4.txt").write_text("No pulmonary nodules.")
    (tmp_path / "1.2.5.txt").write_bytes(b"\xff\xfe nodule")
    (tmp_path / "readme.md").write_text("4 mm RUL nodule")
    records = read_reports(tmp_path)
    assert [label.series_uid for label in records.labels] == ["1.2.3"]
    assert records.labels[0].source == f"{tmp_path / '1.2.3.txt'}[0:29]"
    assert [item.series_uid for item in records.clean] == ["1.2.4"]
    (error,) = records.rejected
    assert re.search(r"1\.2\.5\.txt: file: expected a readable UTF-8 text", str(error))


def test_a_column_of_reports(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('SeriesUID,Report\na,"5 mm nodule, RUL"\n,x\nb,\nc,"RUL, LLL nodules",more\n')
    records = read_reports(path)
    (label,) = records.labels
    assert (label.series_uid, label.lobe, label.diameter_mm) == ("a", RUL, 5)
    assert label.source == f"{path}, row 2[0:16]"
    assert [str(error).split("r.csv, ")[1] for error in records.rejected] == [
        "row 5: fields: expected at most 2, got 3",
        "row 3: seriesuid: expected a series UID, got nothing",
        "row 4: text: expected a nodule, or that there are none at all, got neither",
    ]
    with pytest.raises(InputError, match="header: expected the columns notes, got SeriesUID, Rep"):
        read_reports(path, column="notes")


def test_no_reports_at_all(tmp_path):
    with pytest.raises(InputError, match=r"reports: expected files <series UID>\.txt, got none"):
        read_reports(tmp_path)
    with pytest.raises(InputError, match="reports: expected a folder .* got nothing there"):
        read_reports(tmp_path / "none")
