"""One page after a training, for a radiologist: did EM understand the records?

The page is one HTML file without scripts that asks nothing of the network. Slices are drawn in an
SVG whose units are LPS mm: x grows to the patient's left and so to the right of the picture, y to
the back and so downwards, which is how a radiologist looks at a chest.
"""

from __future__ import annotations

import base64
import io
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from itertools import zip_longest
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.typing import HashableList
from PIL import Image
from scipy.special import entr

from deepem.figures import LUNG_WINDOW_HU
from deepem.files import atomic_path
from deepem.froc import FP_RATES
from deepem.nodule import Lobe, Proposal, WeakLabel
from deepem.observation import LOBES, LobeModel, SliceModel
from deepem.rounds import Explained
from deepem.scan import HU_WINDOW, SPACING_MM, Scan

_CLEAR = 0.75
"""Even a perfect proposal leaves the null hypothesis its share."""

_MISSED = 0.5
_NUMBERED = 0.03
"""Proposals with less of a label are drawn without a number, so that numbers can be read."""

_NEAR_MM = SliceModel().slack_mm + 2 * SliceModel().sigma_mm
"""Proposals this far from a slice may still be meant by it (Eq. 3)."""

_GAP_MM = 2.0
"""Circles are drawn outside of the nodules, so that their edges can be seen."""

_CLOSE_UP_MM = 60.0
_TOP = 5

_LOBE_WORDS = {
    Lobe.RUL: "right upper lobe",
    Lobe.RML: "right middle lobe",
    Lobe.RLL: "right lower lobe",
    Lobe.LUL: "left upper lobe",
    Lobe.LINGULA: "lingula",
    Lobe.LLL: "left lower lobe",
}


@dataclass(frozen=True, eq=False)
class _Case:
    """One label with what the E-step says of it; posterior: (P,), null: the rest."""

    scan: Scan
    label: WeakLabel
    proposals: tuple[Proposal, ...]
    posterior: np.ndarray
    null: float
    chosen: frozenset[int]

    @cached_property
    def ranked(self) -> list[int]:
        """Proposals by falling posterior."""
        return np.argsort(-self.posterior, kind="stable").tolist()

    @property
    def best(self) -> Proposal | None:
        """The one that it was given to, or else would have been."""
        ranked = [at for at in self.ranked if at in self.chosen] or self.ranked
        return self.proposals[ranked[0]] if ranked else None

    @property
    def entropy(self) -> float:
        """Nats over proposals and null."""
        return float(entr(self.posterior).sum() + entr(self.null))

    @property
    def kind(self) -> str:
        """One of `_KINDS`."""
        if self.null >= _MISSED:
            return "missed"
        return "clear" if self.posterior.max(initial=0.0) >= _CLEAR else "ambiguous"


@dataclass(frozen=True)
class _Kind:
    """What may become of a label; order: sorts the plainest example to the front."""

    meaning: str
    color: str
    order: Callable[[_Case], float]


_KINDS = {
    "clear": _Kind(
        f"one proposal is meant with at least {_CLEAR:.0%}", "#0072b2", lambda case: case.entropy
    ),
    "ambiguous": _Kind("several could be meant", "#b35806", lambda case: -case.entropy),
    "missed": _Kind(
        f"with at least {_MISSED:.0%}, none of the detector's proposals is meant",
        "#5a5a5a",
        lambda case: -case.null,
    ),
}


def write_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    verdict: str,
    history: Sequence[dict[str, Any]],
    explained: Sequence[Explained],
    labels_shown: int = 12,
    skipped: Sequence[str] = (),
) -> None:
    """Write the page: verdict, curves and, for a sample of the labels, what became of them.

    history: of `training.TrainResult`. explained: the last round of EM; empty for a training
    without. labels_shown: so many labels, in turn the clearest, the most ambiguous and the most
    surely missed. skipped: what could not be used, a line each. All text is escaped.
    """
    cases = [
        _Case(item.scan, label, item.proposals, row, float(null), frozenset(chosen))
        for item in explained
        for label, row, null, chosen in zip(
            item.labels, item.posterior.posterior, item.posterior.null, item.chosen, strict=True
        )
    ]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="verdict">{escape(verdict)}</p>',
        _shares(explained, cases) if explained else "",
        _course(history) if history else "",
        _examples(cases, labels_shown) if cases else "",
        f"<h2>Not used: {len(skipped)}</h2>" if skipped else "",
        *(f'<p class="small">{escape(line)}</p>' for line in skipped),
    ]
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, parts)))
    with atomic_path(path) as aside:
        aside.write_text(page, encoding="utf-8")


def _sample(cases: Sequence[_Case], count: int) -> list[_Case]:
    """The kinds in turn, of each the plainest example that is left."""
    ranked = [
        sorted((case for case in cases if case.kind == name), key=kind.order)
        for name, kind in _KINDS.items()
    ]
    return [case for turn in zip_longest(*ranked) for case in turn if case][:count]


def _shares(explained: Sequence[Explained], cases: Sequence[_Case]) -> str:
    """How many labels of the last round are of each kind."""
    clean = sum(not item.labels for item in explained)
    number = Counter(case.kind for case in cases)
    bar = "".join(
        f'<div style="flex:{number[name]};background:{kind.color}">{number[name]} {name}</div>'
        for name, kind in _KINDS.items()
        if number[name]
    )
    meanings = "; ".join(f"<b>{name}</b>: {kind.meaning}" for name, kind in _KINDS.items())
    return f"""<h2>What EM made of the records</h2>
<p>Last round: {len(cases)} recorded nodules (scans: {len(explained) - clean}; scans that the
records call free of nodules: {clean}).</p>
<div class="bar">{bar}</div>
<p class="small">{meanings}.</p>"""


def _examples(cases: Sequence[_Case], count: int) -> str:
    """Cards of a sample of the labels, by kind."""
    shown = _sample(cases, count)
    groups = []
    for name in _KINDS:
        cards = [_card(case) for case in shown if case.kind == name]
        total = sum(case.kind == name for case in cases)
        if cards:
            groups += [f"<h3>{name.capitalize()}: {len(cards)} of {total}</h3>", *cards]
    return f"""<h2>Records and what they were taken for</h2>
<p class="small">Axial slices with the patient's right on the left.
<span class="given">Orange, solid</span>: given to the record, at least in part, and taught to the
detector (● in the table). <span class="other">Blue, dashed</span>: not given to it. The number
at a circle is the proposal's row in the table, with its posterior, from {_NUMBERED:.0%} on. Drawn
is what lies within {_NEAR_MM:.1f} mm of the slice, circles {_GAP_MM:g} mm outside of the proposed
edges. Off the slice, + is towards the head. The likely lobe is the one at this place in the lungs.
</p>
{"".join(groups)}"""


def _card(case: _Case) -> str:
    """One label: its words, the slice it names, the nodule it is given to, the alternatives."""
    label, best, grid = case.label, case.best, case.scan.grid
    low, high = grid.extent_lps_mm()
    pictures = ""
    best_z_mm = best.nodule.center_lps_mm[2] if best else None
    z_mm = best_z_mm if label.z_lps_mm is None else label.z_lps_mm
    if z_mm is not None:
        named = "best proposal" if label.z_lps_mm is None else "reported slice"
        pictures += _picture(named, case, z_mm, low[:2], high[:2], width_px=460)
    if best:
        center = np.array(best.nodule.center_lps_mm)
        corners = center[:2] - _CLOSE_UP_MM / 2, center[:2] + _CLOSE_UP_MM / 2
        pictures += _picture("best proposal", case, center[2], *corners, width_px=270)
    return f"""<section>
<p><b class="kind" style="background:{_KINDS[case.kind].color}">{case.kind}</b>
<b>{escape(_words(label, case.scan))}</b></p>
<p class="small">{escape(label.source or "no source")} · series {escape(label.series_uid)} ·
entropy {case.entropy:.2f} nats</p>
<div class="card">{pictures or "<p>No slice named and nothing proposed: no picture.</p>"}
{_alternatives(case)}</div>
</section>"""


def _words(label: WeakLabel, scan: Scan) -> str:
    """What the record says, in a radiologist's words."""
    lobe = _LOBE_WORDS[label.lobe] if label.lobe else "lobe not named"
    words = [lobe, "slice not named"]
    if label.z_lps_mm is not None:
        slices = scan.grid.shape[2]
        number = slices - round(scan.grid.to_index(np.array([0, 0, label.z_lps_mm]))[2])
        where = f"slice {number} of {slices} from the head, at {SPACING_MM:g} mm"
        if not 1 <= number <= slices:
            where = "outside of the prepared scan, the nearest slice is shown"
        words[1] = f"z = {label.z_lps_mm:.1f} mm ({where})"
    if label.diameter_mm is not None:
        words.append(f"{label.diameter_mm:g} mm")
    words += [label.attenuation] if label.attenuation else []
    words += [f"{label.margin} margin"] if label.margin else []
    return ", ".join(words).replace("_", " ")


def _alternatives(case: _Case) -> str:
    """The best proposals with what speaks for them; the rest, and the null, to make up 100 %."""
    center = np.array([p.nodule.center_lps_mm for p in case.proposals]).reshape(-1, 3)
    log_lobe = LobeModel.anatomical().log_probability(case.scan.lungs.relative(center))
    rows = []
    for rank, at in enumerate(case.ranked[:_TOP], 1):
        proposal = case.proposals[at]
        off = "–" if case.label.z_lps_mm is None else f"{center[at, 2] - case.label.z_lps_mm:+.1f}"
        rows.append([
            f"{rank} ●" if at in case.chosen else str(rank), f"{proposal.probability:.2f}", off,
            LOBES[int(log_lobe[at].argmax())].value, f"{proposal.nodule.diameter_mm:.1f}",
            f"{case.posterior[at]:.1%}",
        ])  # fmt: skip
    rest = case.ranked[_TOP:]
    if rest:
        rows.append([f"the {len(rest)} others", f"{case.posterior[rest].sum():.1%}"])
    rows.append(["none: the detector missed it", f"{case.null:.1%}"])
    head = [
        "proposal",
        "detector",
        "mm\u00a0off slice",
        "likely lobe",
        "size,\u00a0mm",
        "posterior",
    ]
    return _table(head, rows, bold=len(rows) - 1 if case.kind == "missed" else 0)


def _picture(
    name: str, case: _Case, z_mm: float, low_mm: np.ndarray, high_mm: np.ndarray, width_px: int
) -> str:
    """The axial slice nearest to ``z_mm`` between two corners (x, y), and the proposals near it."""
    grid = case.scan.grid
    corners = grid.to_index(np.array([[*low_mm, z_mm], [*high_mm, z_mm]]))
    edges = np.clip(np.rint(corners[:, :2] + 0.5), 0, grid.shape[:2]).astype(int)
    (i, j), (i_end, j_end) = edges
    k = int(np.clip(np.rint(corners[0, 2]), 0, grid.shape[2] - 1))
    left, top, shown_z_mm = grid.to_world(np.array([i - 0.5, j - 0.5, k]))
    (x, y), (width, height) = low_mm, high_mm - low_mm
    px = width / width_px  # mm
    marks = "".join(
        _mark(case, rank, at, px, side=1 if nodule.center_lps_mm[0] < x + width / 2 else -1)
        for rank, at in reversed(list(enumerate(case.ranked, 1)))  # the best on top
        for nodule in [case.proposals[at].nodule]
        if abs(nodule.center_lps_mm[2] - shown_z_mm) <= max(_NEAR_MM, nodule.diameter_mm / 2)
    )
    view = f"{x:.2f} {y:.2f} {width:.2f} {height:.2f}"
    return f"""<figure style="flex:{width_px} {width_px} 0">
<svg role="img" aria-label="{name}" viewBox="{view}" font-size="{13 * px:.2f}">
<image x="{left:.2f}" y="{top:.2f}" width="{(i_end - i) * SPACING_MM:g}"
 height="{(j_end - j) * SPACING_MM:g}" preserveAspectRatio="none"
 href="{_slice_png(case.scan.image[i:i_end, j:j_end, k].T)}"/>
{marks}
<text x="{x + 5 * px:.2f}" y="{y + height / 2:.2f}">R</text>
<text x="{x + width - 5 * px:.2f}" y="{y + height / 2:.2f}" text-anchor="end">L</text>
</svg><figcaption>{name}, z = {shown_z_mm:.1f} mm</figcaption></figure>"""


def _mark(case: _Case, rank: int, at: int, px: float, side: int) -> str:
    """A proposal as a circle, its number on the given side (1: right, -1: left).

    Numbers are by turns above and below, so that those of neighbours can be told apart.
    """
    proposal, share = case.proposals[at], float(case.posterior[at])
    (x, y, _), radius = proposal.nodule.center_lps_mm, proposal.nodule.diameter_mm / 2 + _GAP_MM
    given = at in case.chosen
    name = "given" if given else "other"
    width = (2.5 if given and proposal is case.best else 1.2) * px
    mark = f'<circle class="{name}" cx="{x:.2f}" cy="{y:.2f}" r="{radius:.2f}" '
    mark += f'stroke-width="{width:.3f}"/>'
    if share >= _NUMBERED:
        x += side * (radius + 2 * px)
        y += -0.6 * radius if rank % 2 else 0.6 * radius + 13 * px
        anchor = "start" if side > 0 else "end"
        mark += f'<text class="{name}" x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}">'
        mark += f"{rank}: {share:.0%}</text>"
    return mark


def _slice_png(pixels: np.ndarray) -> str:
    """Data address of (rows, columns) of a prepared scan, in the lung window."""
    low, high = HU_WINDOW
    hu = low + pixels * ((high - low) / 255)
    shade = np.rint(np.interp(hu, LUNG_WINDOW_HU, (0, 255))).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(shade).save(file, "PNG")
    return _address(file)


def _address(png: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


_COLUMNS = {"step": ("step", 0), "minutes": ("minutes", 1), "loss": ("loss", 4), "cpm": ("CPM", 3)}
"""Of an entry of the history: heading and digits."""

_EM_COLUMNS = {
    "round": ("round", 0),
    "scans": ("scans", 0),
    "labels": ("records", 0),
    "proposals_per_scan": ("proposals per scan", 1),
    "unexplained": ("unexplained", 3),
    "entropy": ("entropy (nats)", 2),
    "evidence": ("log evidence (nats)", 2),
    "lobe_accuracy": ("lobe confirmed", 3),
}
"""The same for its part on EM, `rounds.summary`."""

_MOSAIC: list[HashableList[str]] = [
    ["cpm", "cpm", "froc", "froc"],
    ["unexplained", "entropy", "evidence", "lobe_accuracy"],
]


def _course(history: Sequence[dict[str, Any]]) -> str:
    """Curves and table of what was measured on the way."""
    rounds = [entry["em"] for entry in history if entry.get("em")]
    figure = Figure(figsize=(11, 5.2 if rounds else 2.9), layout="constrained")
    panels = figure.subplot_mosaic(_MOSAIC if rounds else _MOSAIC[:1])
    _cpm_curve(panels["cpm"], history)
    _sensitivity_curves(panels["froc"], history)
    numbers = [one["round"] for one in rounds]
    for name, panel in panels.items():
        if name in _EM_COLUMNS:
            panel.plot(numbers, _floats(rounds, name), "o-", color=_LAST)
            panel.set(title=_EM_COLUMNS[name][0], xlabel="round of EM", xticks=numbers)
        if name not in ("entropy", "evidence"):  # shares
            panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150)

    columns = _COLUMNS | (_EM_COLUMNS if rounds else {})
    flat = [{**entry, **(entry.get("em") or {})} for entry in history]
    rows = [[_number(one.get(key), n) for key, (_, n) in columns.items()] for one in flat]
    cpm = _floats(history, "cpm")
    best = int(np.nanargmax(cpm)) if np.isfinite(cpm).any() else -1
    return f"""<h2>The course of the training</h2>
<img alt="curves of the training" src="{_address(file)}">
{_table([heading for heading, _ in columns.values()], rows, bold=best)}
<p class="small">Bold: the best CPM.{_EM_WORDS if rounds else ""}</p>"""


_FIRST, _LAST = "#6b6b6b", "#0072b2"

_EM_WORDS = """ Unexplained: share of the records that were given to no proposal. Entropy: how
undecided EM is, 0 for certain. Log evidence: how well the proposals explain the records. Lobe
confirmed: how often the best proposal lies where the record says."""


def _cpm_curve(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    """CPM over steps; what was trained on a round of EM is shaded."""
    steps = [0, *(entry["step"] for entry in history)]
    axes.plot(steps[1:], _floats(history, "cpm"), "o-", color=_LAST)
    for start, end, entry in zip(steps, steps[1:], history, strict=False):
        if entry.get("em"):
            number = entry["em"]["round"]
            axes.axvspan(start, end, color="#e69f00", alpha=0.24 if number % 2 else 0.12)
            axes.text((start + end) / 2, 0.98, f"EM {number}", ha="center", va="top", fontsize=8)
    axes.set(title="CPM on scans held out", xlabel="training step")


def _sensitivity_curves(axes: Axes, history: Sequence[dict[str, Any]]) -> None:
    ends = [("first", history[0], _FIRST, "o--"), ("last", history[-1], _LAST, "o-")]
    for name, entry, color, style in ends[-len(history) :]:  # a single one is the last
        label = f"{name} (step {entry['step']})"
        sensitivity = np.array(entry["sensitivity"], dtype=np.float64)
        axes.plot(FP_RATES, sensitivity, style, color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(FP_RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.set(title="sensitivity on scans held out", xlabel="false positives per scan")
    axes.legend(loc="lower right", frameon=False)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], bold: int) -> str:
    """The first cell of a row that is too short spans what is missing."""

    def line(cells: Sequence[str], tag: str = "td", weight: str = "normal") -> str:
        span = len(head) - len(cells) + 1
        inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells[1:])
        first = f'<{tag} colspan="{span}">{escape(cells[0])}</{tag}>'
        return f'<tr style="font-weight:{weight}">{first}{inner}</tr>'

    body = [line(row, weight="bold" if at == bold else "normal") for at, row in enumerate(rows)]
    return f"<table>{line(head, 'th', 'bold')}{''.join(body)}</table>"


def _floats(entries: Iterable[dict[str, Any]], key: str) -> np.ndarray:
    """None, as a history holds it for what could not be measured, becomes NaN."""
    return np.array([entry[key] for entry in entries], dtype=np.float64)


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None or np.isnan(value) else f"{value:.{digits}f}"


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<p class="small">This page holds pictures of patients: treat it as their data.</p>
</body>
</html>
"""

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; max-width: 1180px;
  margin: 2em auto; padding: 0 1em; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-bottom: 1px solid #ccc; margin-top: 2em; padding-bottom: .2em; break-after: avoid; }
h3 { break-after: avoid; }
img { max-width: 100%; }
.verdict { font-size: 1.25em; border-left: 5px solid #0072b2; padding-left: .7em; }
.small { font-size: .87em; color: #444; overflow-wrap: anywhere; }
.bar { display: flex; color: white; font-weight: 600; print-color-adjust: exact; }
.bar div { padding: .3em .6em; white-space: nowrap; }
table { border-collapse: collapse; font-size: .87em; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .5em; min-width: 3.6em; border-bottom: 1px solid #ddd; text-align: right; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
section { break-inside: avoid; border-top: 1px solid #ccc; margin: 1em 0 1.6em; }
section p { margin: .5em 0; }
.kind { color: white; padding: .1em .5em; margin-right: .4em; print-color-adjust: exact; }
.card { display: flex; gap: 1em; align-items: flex-start; }
.card table { flex: 400 400 0; }
figure { margin: 0; }
figcaption { font-size: .87em; color: #444; }
svg { display: block; width: 100%; background: black; print-color-adjust: exact; }
svg text { fill: white; stroke: black; stroke-width: .2em; paint-order: stroke;
  stroke-linejoin: round; font-weight: 600; }
circle { fill: none; }
circle.given { stroke: #ffb000; }
circle.other { stroke: #56b4e9; stroke-dasharray: .4em .3em; }
svg text.given { fill: #ffb000; }
svg text.other { fill: #56b4e9; }
span.given { border-bottom: 3px solid #ffb000; }
span.other { border-bottom: 3px dashed #56b4e9; }
@media print { body { font-size: 10.5px; margin: 0; } h2 { margin-top: 1em; } }
"""
