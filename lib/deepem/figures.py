"""Pictures of results: FROC curves, training curves, findings on the CT."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Rectangle
from matplotlib.patheffects import withStroke
from scipy.ndimage import map_coordinates

from deepem.files import atomic_path
from deepem.froc import FP_RATES, Froc
from deepem.geometry import Grid
from deepem.nodule import Nodule, Proposal

LUNG_WINDOW_HU = (-1350.0, 150.0)
"""Level -600, width 1500: the usual lung window of a reading station."""

_PROPOSAL_COLOR = "#ffb000"
_NODULE_COLOR = "#35c9ff"
_PIXEL_MM = 0.5
_TILE_MM = 80.0
_MAX_TILES = 12
_OUTSIDE_HU = -1024.0
_READABLE = [withStroke(linewidth=2, foreground="black")]

_PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class _Plane:
    """A plane through the patient as a radiologist looks at it; axes x, y, z are 0, 1, 2."""

    name: str
    normal: int
    across: int  # world axis that grows to the right of the picture
    up: int  # world axis along the height of the picture
    upward: bool  # whether it grows to the top
    sides: tuple[str, str, str, str]  # letters at the left, right, top and bottom


_AXIAL = _Plane("axial", normal=2, across=0, up=1, upward=False, sides=("R", "L", "A", "P"))
_CORONAL = _Plane("coronal", normal=1, across=0, up=2, upward=True, sides=("R", "L", "S", "I"))
_SAGITTAL = _Plane("sagittal", normal=0, across=1, up=2, upward=True, sides=("A", "P", "S", "I"))


def froc_plot(curves: Mapping[str, Froc], path: _PathLike) -> None:
    """FROC curves by name, false positives per scan from 1/8 to 8 on a logarithmic axis.

    Dots mark the seven rates that the CPM averages. A result without nodules has no curve; the
    legend says so.
    """
    figure, (axes,) = _figure(1, 1, width=6.4, height=4.6)
    for number, (name, froc) in enumerate(curves.items()):
        color = f"C{number}"
        if np.isnan(froc.cpm):
            axes.plot([], [], color=color, label=f"{name}: no nodules")
            continue
        # Drawn by the same interpolation that the seven numbers come from.
        rate = np.union1d(np.geomspace(FP_RATES[0], FP_RATES[-1], 500), FP_RATES)
        sensitivity = np.interp(rate, froc.curve_fp_per_scan, froc.curve_sensitivity)
        axes.plot(rate, sensitivity, color=color, label=f"{name}: CPM {froc.cpm:.3f}")
        axes.plot(froc.fp_per_scan, froc.sensitivity, "o", color=color, markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(FP_RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    axes.set_xlim(FP_RATES[0] / 1.1, FP_RATES[-1] * 1.1)
    axes.set_xlabel("false positives per scan")
    _unit_axis(axes, "sensitivity")
    if curves:
        axes.legend(loc="lower right", frameon=False)
    _save(figure, path)


def training_plot(
    runs: Mapping[str, Sequence[Sequence[tuple[int, float]]]],
    path: _PathLike,
    label: str = "training step",
) -> None:
    """CPM over training steps. ``runs``: for every name one history of (step, CPM) per seed.

    label: of the steps, where they are something else.

    Each seed is a thin line; the thick line is their mean at the steps that all of them measured.
    The legend stands below the axes, since curves may run anywhere in them.
    """
    figure, (axes,) = _figure(1, 1, width=6.4, height=4.2 + 0.13 * len(runs))
    for number, (name, seeds) in enumerate(runs.items()):
        color = f"C{number}"
        histories = [dict(history) for history in seeds]
        for history in histories:
            steps = sorted(history)
            cpm = [history[step] for step in steps]
            axes.plot(steps, cpm, color=color, linewidth=0.8, alpha=0.5)
        shared = sorted(set.intersection(*map(set, histories))) if histories else []
        mean = [np.mean([history[step] for history in histories]) for step in shared]
        count = f"{len(histories)} seed{'s' if len(histories) != 1 else ''}"
        last = f", last {mean[-1]:.3f}" if mean else ""
        axes.plot(shared, mean, ".-", color=color, linewidth=2.2, label=f"{name} ({count}{last})")
    axes.set_xlabel(label)
    _unit_axis(axes, "CPM (mean sensitivity)")
    if runs:
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    _save(figure, path)


Interval = tuple[float, float | None, float | None]
"""Mean, low, high; without the last two only the mean is drawn."""


def differences_plot(differences: Mapping[str, Interval], label: str, path: _PathLike) -> None:
    """Horizontal bars of (mean, low, high) by name, first on top, with zero marked."""
    figure, (axes,) = _figure(1, 1, width=6.4, height=1.2 + 0.45 * len(differences))
    names = list(differences)
    values = np.array([differences[name] for name in names], float).reshape(-1, 3)
    mean, low, high = values.T
    whiskers = np.nan_to_num(np.abs([mean - low, high - mean]))
    axes.barh(names, mean, xerr=whiskers, color=[f"C{at}" for at in range(len(names))], capsize=4)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(label)
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def curves_with_intervals(
    curves: Mapping[str, Mapping[float, Interval]], label: str, path: _PathLike
) -> None:
    """One panel for every name: (mean, low, high) over a level, on one scale, zero marked."""
    figure, panels = _figure(1, len(curves), width=3.4 * len(curves), height=3.4)
    for axes in panels[1:]:
        axes.sharey(panels[0])  # before anything is drawn, so that the limits hold all of it
    for axes, (name, points) in zip(panels, curves.items(), strict=True):
        levels = list(points)
        mean, low, high = np.array(list(points.values()), float).T
        whiskers = np.nan_to_num([mean - low, high - mean])
        axes.errorbar(levels, mean, yerr=whiskers, fmt="o-", capsize=4)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(label)
    _save(figure, path)


def coverage_plot(curves: Mapping[str, Sequence[tuple[float, float]]], path: _PathLike) -> None:
    """Precision over coverage, both 0..1: curves of (coverage, precision) by name."""
    figure, (axes,) = _figure(1, 1, width=6.4, height=4.2 + 0.13 * len(curves))
    for name, points in curves.items():
        axes.plot(*np.array(points).T, label=name)
    axes.set_xlabel("share of labels that are used")
    axes.set_xlim(0, 1.02)
    _unit_axis(axes, "share of these that are right")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    _save(figure, path)


def slice_with_boxes(
    hu: np.ndarray,
    grid: Grid,
    proposals: Sequence[Proposal],
    nodules: Sequence[Nodule],
    path: _PathLike,
    center_lps_mm: Sequence[float] | np.ndarray | None = None,
    title: str = "",
) -> None:
    """Proposals (boxes with their probability) and true nodules (circles) on the CT.

    hu: (I, J, K) Hounsfield units on ``grid``, which may be oblique or flipped: planes are
    resampled along the patient's axes and shown as a radiologist sees them, the patient's right on
    the left of the picture and the head up. Only what a plane cuts is drawn.
    With ``center_lps_mm``: the axial, coronal and sagittal plane through that point. Without: an
    axial close-up of every nodule, then of the best proposals that no nodule explains, 12 at most;
    the three planes through the middle of the scan when there is nothing to show.
    """
    if hu.shape != grid.shape:
        raise ValueError(f"hu: expected the shape of the grid, {grid.shape}, got {hu.shape}")
    lowest, highest = grid.extent_lps_mm()
    findings = _findings(proposals, nodules)
    if center_lps_mm is not None or not findings:
        center = np.asarray((lowest + highest) / 2 if center_lps_mm is None else center_lps_mm)
        planes = (_AXIAL, _CORONAL, _SAGITTAL)
        sizes = highest - lowest
        figure, all_axes = _figure(
            1, 3, width=15, height=5.8, ratios=[sizes[plane.across] for plane in planes]
        )
        for axes, plane in zip(all_axes, planes, strict=True):
            _draw(axes, plane, hu, grid, center, lowest, highest, proposals, nodules)
            axes.set_title(f"{plane.name}, {'xyz'[plane.normal]} = {center[plane.normal]:.1f} mm")
    else:
        columns = min(len(findings), 4)
        rows = -(-len(findings) // columns)
        figure, all_axes = _figure(rows, columns, width=3.2 * columns, height=3.5 * rows + 0.5)
        for axes in all_axes[len(findings) :]:
            axes.set_axis_off()
        for axes, (name, nodule) in zip(all_axes, findings, strict=False):
            center = np.asarray(nodule.center_lps_mm)
            half = max(_TILE_MM / 2, nodule.diameter_mm)
            box = (center - half, center + half)
            _draw(axes, _AXIAL, hu, grid, center, *box, proposals, nodules)
            axes.set_title(f"{name}, {nodule.diameter_mm:.1f} mm, z = {center[2]:.1f}", fontsize=9)
    handles = [
        Line2D([], [], marker=marker, ls="", mfc="none", mec=color, markersize=9, label=label)
        for marker, color, label in (
            ("s", _PROPOSAL_COLOR, "proposal"),
            ("o", _NODULE_COLOR, "nodule"),
        )
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False)
    if title:
        figure.suptitle(title)
    _save(figure, path)


def _findings(proposals: Sequence[Proposal], nodules: Sequence[Nodule]) -> list[tuple[str, Nodule]]:
    """What deserves a close-up: every nodule, then the best proposals outside of them."""

    def explained(center: tuple[float, float, float]) -> bool:
        return any(
            np.linalg.norm(np.subtract(center, nodule.center_lps_mm)) < nodule.diameter_mm / 2
            for nodule in nodules
        )

    ranked = sorted(proposals, key=lambda proposal: -proposal.logit)
    others = [
        (f"proposal {proposal.probability:.2f}", proposal.nodule)
        for proposal in ranked
        if not explained(proposal.nodule.center_lps_mm)
    ]
    return [*((f"nodule {n + 1}", nodule) for n, nodule in enumerate(nodules)), *others][
        :_MAX_TILES
    ]


def _plane_hu(
    plane: _Plane,
    hu: np.ndarray,
    grid: Grid,
    center_lps_mm: np.ndarray,
    lowest_lps_mm: np.ndarray,
    highest_lps_mm: np.ndarray,
) -> np.ndarray:
    """(rows, columns) HU of the plane through the centre, first row on top, `_PIXEL_MM` apart."""

    def steps(axis: int) -> np.ndarray:
        return np.arange(lowest_lps_mm[axis] + _PIXEL_MM / 2, highest_lps_mm[axis], _PIXEL_MM)

    down = steps(plane.up)[::-1] if plane.upward else steps(plane.up)
    across = steps(plane.across)
    points = np.empty((len(down), len(across), 3))
    points[..., plane.normal] = center_lps_mm[plane.normal]
    points[..., plane.up] = down[:, None]
    points[..., plane.across] = across
    index = np.moveaxis(grid.to_index(points), -1, 0)
    return map_coordinates(
        hu, index, output=np.float32, order=1, mode="grid-constant", cval=_OUTSIDE_HU
    )


def _draw(
    axes: Axes,
    plane: _Plane,
    hu: np.ndarray,
    grid: Grid,
    center_lps_mm: np.ndarray,
    lowest_lps_mm: np.ndarray,
    highest_lps_mm: np.ndarray,
    proposals: Sequence[Proposal],
    nodules: Sequence[Nodule],
) -> None:
    """One plane between two world corners, axes in LPS mm, with everything that it cuts."""
    pixels = _plane_hu(plane, hu, grid, center_lps_mm, lowest_lps_mm, highest_lps_mm)
    left = lowest_lps_mm[plane.across]
    right = left + pixels.shape[1] * _PIXEL_MM
    low = lowest_lps_mm[plane.up]
    high = low + pixels.shape[0] * _PIXEL_MM
    bottom, top = (low, high) if plane.upward else (high, low)
    darkest, brightest = LUNG_WINDOW_HU
    axes.imshow(
        pixels,
        cmap="gray",
        vmin=darkest,
        vmax=brightest,
        extent=(left, right, bottom, top),
        interpolation="bilinear",
    )
    for nodule in nodules:
        center, radius = np.asarray(nodule.center_lps_mm), nodule.diameter_mm / 2
        off = abs(center[plane.normal] - center_lps_mm[plane.normal])
        if off < radius:
            middle = (center[plane.across], center[plane.up])
            cut = float(np.sqrt(radius**2 - off**2))
            axes.add_patch(Circle(middle, cut, fill=False, color=_NODULE_COLOR, linewidth=1.2))
    for proposal in proposals:
        center, size = (np.asarray(proposal.nodule.center_lps_mm), proposal.nodule.diameter_mm)
        if abs(center[plane.normal] - center_lps_mm[plane.normal]) < size / 2:
            x, y = center[plane.across] - size / 2, center[plane.up] - size / 2
            square = Rectangle((x, y), size, size, fill=False, color=_PROPOSAL_COLOR, linewidth=1.2)
            axes.add_patch(square)
            axes.annotate(
                f"{proposal.probability:.2f}",
                (x + size, y + size if plane.upward else y),
                xytext=(2, 1),
                textcoords="offset points",
                color=_PROPOSAL_COLOR,
                fontsize=8,
                path_effects=_READABLE,
                annotation_clip=True,
            )
    places = ((0.015, 0.5), (0.985, 0.5), (0.5, 0.985), (0.5, 0.015))
    alignments = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
    for letter, (x, y), (ha, va) in zip(plane.sides, places, alignments, strict=True):
        text = axes.text(x, y, letter, transform=axes.transAxes, ha=ha, va=va)
        text.set(color="white", fontsize=9, path_effects=_READABLE)
    axes.set(xlim=(left, right), ylim=(bottom, top), xticks=[], yticks=[])


def _figure(
    rows: int, columns: int, width: float, height: float, ratios: Sequence[float] | None = None
) -> tuple[Figure, list[Axes]]:
    """A figure in inches and its axes, row by row; without pyplot, so nothing stays in memory."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios)
    return figure, list(axes.flat)


def _unit_axis(axes: Axes, label: str) -> None:
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.02)
    axes.set_yticks(np.linspace(0, 1, 11))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: _PathLike) -> None:
    with atomic_path(path) as aside:
        figure.savefig(aside, dpi=110)
