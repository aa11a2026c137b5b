"""The page after a training: whole in itself, harmless, and every mark where it belongs."""

from __future__ import annotations

import base64
import io
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.image import imread

from deepem.em import e_step, most_probable
from deepem.explain import explain
from deepem.geometry import Grid
from deepem.labelled import WeakStudy
from deepem.lungs import Lungs
from deepem.nodule import Lobe, Nodule, Proposal, WeakLabel
from deepem.observation import LobeModel, ObservationModel, SliceModel
from deepem.phantom import make_phantom
from deepem.report import write_report
from deepem.rounds import Explained
from deepem.scan import Scan, prepare
from deepem.volume import Study, Volume

HOSTILE = "<script>alert('1')</script> & \"quoted\" {title}"


class _Page(HTMLParser):
    """Elements with their attributes, the text, and the rows of every table."""

    def __init__(self, path):
        super().__init__()
        self.in_cell = False
        self.source = path.read_text(encoding="utf-8")
        self.elements, self.tables, self.text = [], [], ""
        self.feed(self.source)
        found = re.findall(r"<svg.*?</svg>", self.source, re.DOTALL)
        self.pictures = [ElementTree.fromstring(svg) for svg in found]

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture
def page(tmp_path):
    """Writes a page with the given parts and reads it."""

    def write(explained=(), history=(), **more):
        parts = {"title": "a training", "verdict": "published", **more}
        path = tmp_path / "new" / "report.html"
        write_report(path, history=history, explained=explained, **parts)
        assert [file.name for file in path.parent.iterdir()] == ["report.html"]
        return _Page(path)

    return write


def scan_of(image, origin_lps_mm=(-40.0, -10.0, -300.0)):
    grid = Grid.axis_aligned(np.array(origin_lps_mm), 1.0, image.shape)
    low, high = grid.to_world(np.zeros(3)), grid.to_world(np.array(image.shape) - 1)
    return Scan("1.2.3", image, grid, Lungs(np.ones(image.shape, bool), grid, low, high, True), "")


@pytest.fixture(scope="module")
def blank():
    return scan_of(np.zeros((70, 60, 50), np.uint8))


def explained_by(scan, labels, weights, proposals=None):
    """An E-step with the given weights (L, P) of labels for proposals, 0.1 for the null."""
    weights = np.array(weights, float)
    count = weights.shape[1]
    if proposals is None:
        proposals = [Proposal(Nodule((-20.0 + 5 * at, 20, -280), 6), -at) for at in range(count)]
    posterior = e_step(np.zeros(count), np.log(weights), log_null=math.log(0.1))
    study = WeakStudy(Study(scan.series_uid, None, "p"), tuple(labels))
    return Explained(scan, study, tuple(proposals), posterior, most_probable(posterior))


ROUND = {"round": 1, "scans": 9, "labels": 12, "proposals_per_scan": 41.5, "unexplained": 0.25,
         "evidence": -2.5, "entropy": 0.81, "lobe_accuracy": 0.9}  # fmt: skip

CLEAR, AMBIGUOUS, MISSED = (0.98, 0.01), (0.5, 0.4), (0.01, 0.002)


@pytest.fixture(scope="module")
def of_phantom():
    """A synthetic chest whose nodules are proposed, among others, and explained."""
    phantom = make_phantom(11, nodule_count=3)
    scan = prepare(Volume(phantom.hu, phantom.grid, phantom.series_uid))
    labels = tuple(
        replace(label, slice_number=None, slice_convention=None, source=f"report{at}.txt: {at}-9",
                z_lps_mm=item.nodule.center_lps_mm[2])
        for at, (label, item) in enumerate(zip(phantom.weak_labels, phantom.nodules, strict=True))
    )  # fmt: skip
    rng = np.random.default_rng(0)
    places = phantom.grid.to_world(rng.choice(np.argwhere(phantom.lobes > 0), 9))
    proposals = [Proposal(item.nodule, 2.0) for item in phantom.nodules]
    proposals += [Proposal(Nodule(tuple(place), 5), -2.0) for place in places]
    model = ObservationModel(SliceModel(), LobeModel.anatomical())
    posterior = explain(labels, proposals, scan, model, null=0.1, joint=True)
    study = WeakStudy(Study(phantom.series_uid, None, "p"), labels)
    return Explained(scan, study, tuple(proposals), posterior, most_probable(posterior))


def entry(step, cpm=0.5, em=None):
    sensitivity = [cpm] * 7
    found = {"step": step, "minutes": 1.0, "loss": 0.25, "cpm": cpm, "sensitivity": sensitivity}
    return found | ({"em": em} if em else {})


def pixels_of(image):
    """(rows, columns) of brightness 0..1 of an SVG image."""
    png = base64.b64decode(image.get("href").removeprefix("data:image/png;base64,"))
    return imread(io.BytesIO(png))


def brightest_mm(image):
    """Where the bright spot of an SVG image lies, in the units of the picture."""
    pixels = pixels_of(image)
    row, column = np.argwhere(pixels > (pixels.max() + pixels.min()) / 2).mean(0) + 0.5
    x, y, width, height = (float(image.get(key)) for key in ("x", "y", "width", "height"))
    return x + column * width / pixels.shape[1], y + row * height / pixels.shape[0]


def test_the_page_of_a_phantom_holds_records_posteriors_and_nothing_from_outside(page, of_phantom):
    found = page([of_phantom], [entry(10), entry(20, 0.7, ROUND)])
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base"}
    addresses = [a[key] for _, a in found.elements for key in ("src", "href") if key in a]
    assert len(addresses) == 1 + 2 * 3  # curves, two pictures of each label
    assert all(address.startswith("data:image/png;base64,") for address in addresses)
    style = found.source[found.source.index("<style>") : found.source.index("</style>")]
    assert "url(" not in style and "@import" not in style

    course, *alternatives = found.tables
    assert course[2][:5] == ["20", "1.0", "0.2500", "0.700", "1"] and len(course) == 3
    assert course[2][5:] == ["9", "12", "41.5", "0.250", "0.81", "-2.50", "0.900"]
    assert len(alternatives) == 3
    for row, label in enumerate(of_phantom.labels):
        posterior = of_phantom.posterior.posterior[row]
        table = next(t for t in alternatives if t[1][-1] == f"{posterior.max():.1%}")
        top = np.sort(posterior)[::-1][:5]
        assert [line[-1] for line in table[1:6]] == [f"{share:.1%}" for share in top]
        assert table[6:] == [
            [f"the {len(posterior) - 5} others", f"{max(posterior.sum() - top.sum(), 0):.1%}"],
            ["none: the detector missed it", f"{of_phantom.posterior.null[row]:.1%}"],
        ]
        best = of_phantom.proposals[int(posterior.argmax())]
        assert table[1][1:5] == [f"{best.probability:.2f}", "+0.0", label.lobe.value,
                                 f"{best.nodule.diameter_mm:.1f}"]  # fmt: skip
        assert label.source in found.text
        assert f"z = {label.z_lps_mm:.1f} mm (slice " in found.text


def test_marks_lie_on_the_nodules_of_a_phantom(page, of_phantom):
    """Every picture is brighter at the nodule it marks than in the lung around the circle."""
    pictures = page([of_phantom]).pictures
    assert len(pictures) == 6
    for svg in pictures:
        image = svg.find("image")
        pixels = pixels_of(image)
        rows, columns = np.indices(pixels.shape) + 0.5
        thick = max(svg.findall("circle"), key=lambda mark: float(mark.get("stroke-width")))
        x, y, radius = (float(thick.get(key)) for key in ("cx", "cy", "r"))
        off = np.hypot(columns + float(image.get("x")) - x, rows + float(image.get("y")) - y)
        ring = (off > radius) & (off < radius + 3)
        assert pixels[off < 1.5].mean() > np.quantile(pixels[ring], 0.3) + 0.1


@pytest.mark.parametrize("place", [(8, 12, 31), (55, 41, 4)])
def test_a_mark_is_where_the_nodule_is_seen_and_the_right_is_on_the_left(page, place):
    image = np.zeros((70, 60, 50), np.uint8)
    scan = scan_of(image)
    center = scan.grid.to_world(np.array(place))
    i, j, k = np.indices(image.shape)
    image[(i - place[0]) ** 2 + (j - place[1]) ** 2 + (k - place[2]) ** 2 <= 9] = 255
    proposals = [Proposal(Nodule(tuple(center), 7), 0.0)]
    label = WeakLabel("1.2.3", z_lps_mm=center[2])
    found = page([explained_by(scan, [label], [[1.0]], proposals)])
    whole, close_up = found.pictures
    for svg in (whole, close_up):
        (mark,) = svg.findall("circle")
        assert (float(mark.get("cx")), float(mark.get("cy"))) == pytest.approx(center[:2], abs=0.01)
        assert brightest_mm(svg.find("image")) == pytest.approx(center[:2], abs=0.05)
        assert float(mark.get("r")) > 3.5
        at = {text.text: float(text.get("x")) for text in svg.findall("text")}
        assert at["R"] < at["L"]
        assert mark.get("class") == "given" and "1: 91%" in at
    # World x grows to the patient's left, y to the back: small ones are on the left and on top.
    left, top, width, height = map(float, whole.get("viewBox").split())
    assert (left, top, width, height) == (-40.5, -10.5, 70, 60)
    shown = [float(whole.find("image").get(key)) for key in ("x", "y", "width", "height")]
    assert shown == [left, top, width, height]
    left, top, width, height = map(float, close_up.get("viewBox").split())
    assert (left + width / 2, top + height / 2) == pytest.approx(center[:2], abs=0.01)
    assert width == height == 60
    assert f"slice {50 - place[2]} of 50 from the head" in found.text


def test_only_proposals_near_the_slice_are_drawn_the_chosen_one_apart(page, blank):
    near = [Proposal(Nodule((-20, 20, -280), 6), 0), Proposal(Nodule((0, 20, -284), 6), 0)]
    far = Proposal(Nodule((10, 20, -270), 6), 0)
    label = WeakLabel("1.2.3", z_lps_mm=-280.0)
    found = page([explained_by(blank, [label], [[0.6, 0.3, 0.1]], [*near, far])])
    second, best = found.pictures[0].findall("circle")  # the best is drawn last, on top
    assert (best.get("cx"), best.get("class")) == ("-20.00", "given")
    assert (second.get("cx"), second.get("class")) == ("0.00", "other")
    assert float(best.get("stroke-width")) > 2 * float(second.get("stroke-width"))
    assert [row[2] for row in found.tables[0][1:4]] == ["+0.0", "-4.0", "+10.0"]
    assert [row[0] for row in found.tables[0][1:4]] == ["1 ●", "2", "3"]


def test_the_sample_takes_every_kind_in_turn_and_the_plainest_first(page, blank):
    weights = [CLEAR, (0.95, 0.01), (0.6, 0.2), AMBIGUOUS, MISSED, (0.03, 0.002), CLEAR]
    labels = [WeakLabel("1.2.3", z_lps_mm=-280.0, source=f"row {at}") for at in range(7)]
    item = explained_by(blank, labels, weights)
    clean = explained_by(blank, [], np.empty((0, 2)))

    def rows(count):
        text = page([item, clean], labels_shown=count).text
        return re.findall(r"(clear|ambiguous|missed)\n.*?\n.*?(row \d)", text)

    assert rows(3) == [("clear", "row 0"), ("ambiguous", "row 3"), ("missed", "row 4")]
    assert [row for _, row in rows(5)] == ["row 0", "row 6", "row 3", "row 2", "row 4"]
    assert len(rows(12)) == 7 and rows(0) == []
    found = page([item, clean], labels_shown=5)
    assert all(words in found.text for words in ("3 clear", "2 ambiguous", "2 missed"))
    assert "Clear: 2 of 3" in found.text and "Missed: 1 of 2" in found.text
    assert "7 recorded nodules (scans: 1; scans that the\nrecords call free of nodules: 1)" in (
        found.text
    )
    assert page([item, clean], labels_shown=5).source == found.source


def test_text_from_outside_stays_text(page, blank):
    label = WeakLabel(HOSTILE, z_lps_mm=-280.0, source=HOSTILE)
    item = explained_by(blank, [label], [CLEAR])
    found = page([item], title=HOSTILE, verdict=HOSTILE, skipped=[HOSTILE])
    assert "script" not in {tag for tag, _ in found.elements}
    assert found.text.count(HOSTILE) == 6  # title twice, verdict, source, series, not used


def test_a_training_without_records_has_the_curves_alone(page):
    found = page(history=[entry(10), entry(20)])
    assert not found.pictures and [tag for tag, _ in found.elements].count("img") == 1
    assert found.tables[0][0] == ["step", "minutes", "loss", "CPM"] and len(found.tables) == 1
    assert "EM" not in found.text and "Not used" not in found.text
    assert not page().tables


def test_what_could_not_be_measured_is_a_dash(page):
    nothing = dict.fromkeys(ROUND) | {"round": 1, "scans": 4, "labels": 0}
    history = [entry(10, math.nan), entry(20, 0.4, nothing)]
    history[0] |= {"loss": None, "sensitivity": [math.nan] * 7}
    found = page(history=history)
    assert found.tables[0][1] == ["10", "1.0", *["–"] * 10]
    assert found.tables[0][2] == ["20", "1.0", "0.2500", "0.400", "1", "4", "0", *["–"] * 5]
    weights = [attrs["style"] for tag, attrs in found.elements if tag == "tr"]
    assert weights[1:] == ["font-weight:normal", "font-weight:bold"]  # the best that is a number
    assert "bold" not in page(history=history[:1]).source.split("</th></tr>")[1]


def test_a_record_without_slice_and_lobe_is_shown_at_its_best_proposal(page, blank):
    proposals = [Proposal(Nodule((-20, 20, -275), 6), 0), Proposal(Nodule((0, 20, -260), 6), 0)]
    label = WeakLabel("1.2.3", source="row 1", attenuation="ground_glass", diameter_mm=7.5)
    found = page([explained_by(blank, [label], [[0.1, 0.9]], proposals)])
    assert "lobe not named, slice not named, 7.5 mm, ground glass\n" in found.text
    assert [svg.get("aria-label") for svg in found.pictures] == ["best proposal"] * 2
    assert found.text.count("best proposal, z = -260.0 mm") == 2
    assert found.tables[0][1][2] == "–"


def test_a_record_without_proposals_is_shown_at_its_slice_or_not_at_all(page, blank):
    labels = [WeakLabel("1.2.3", Lobe.RUL, z_lps_mm=-280.0), WeakLabel("1.2.3", Lobe.LINGULA)]
    found = page([explained_by(blank, labels, np.empty((2, 0)))])
    (svg,) = found.pictures
    assert not svg.findall("circle") and "reported slice, z = -280.0 mm" in found.text
    assert found.text.count("no picture") == 1 and "2 missed" in found.text
    assert [table[1:] for table in found.tables] == [
        [["none: the detector missed it", "100.0%"]]
    ] * 2


def test_a_slice_outside_of_the_prepared_scan_is_not_passed_off_as_one_inside(page, blank):
    label = WeakLabel("1.2.3", z_lps_mm=-330.0)
    found = page([explained_by(blank, [label], [MISSED])])
    assert "z = -330.0 mm (outside of the prepared scan" in found.text
    assert "reported slice, z = -300.0 mm" in found.text


def test_twelve_labels_of_a_noisy_adult_stay_small(page, rng):
    scan = scan_of(rng.normal(70, 25, (320, 240, 4)).clip(0, 255).astype(np.uint8))
    labels = [WeakLabel("1.2.3", z_lps_mm=-298.0)] * 12
    found = page([explained_by(scan, labels, [CLEAR] * 12)], [entry(10)])
    assert len(found.pictures) == 24 and len(found.source) < 3e6
