"""How often the E-step picks the right proposal, factor by factor, and under wrong records.

python scripts/benchmarks/e_step_quality.py --work DIR    5 seeds; minutes after em_gain.py, whose
                                                          phantoms and warm starts it shares
python scripts/benchmarks/e_step_quality.py --work DIR --model MODEL    with a model of yours

Every variant looks at the same proposals. Writes e_step_quality.json, .md and .png into results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from em_study import (
    RESULTS,
    Size,
    hits_of,
    machine,
    make_phantoms,
    nodule_of,
    run_all,
    scans_of,
    warm_start,
)

from deepem.em import PAPER, EmConfig
from deepem.errors import InputError
from deepem.figures import coverage_plot
from deepem.files import atomic_path, write_json
from deepem.labelled import LabelledStudy, WeakStudy
from deepem.model import load_model
from deepem.network import fused
from deepem.nodule import Lobe, WeakLabel
from deepem.rounds import explain_all, first_model, propose_all, to_rows
from deepem.scan import ScanCache

FOUND = ("proposed", "right", "used", "posterior", "null")


@dataclass(frozen=True)
class Variant:
    """An E-step, and what of each record it may see."""

    name: str
    config: EmConfig
    fields: tuple[str, ...] = ("lobe", "z_lps_mm", "diameter_mm", "attenuation")
    noise: Callable[[Sequence[WeakStudy], np.random.Generator], list[WeakStudy]] | None = None


def wrong_lobes(
    share: float, weak: Sequence[WeakStudy], rng: np.random.Generator
) -> list[WeakStudy]:
    """Records of which a share names another lobe."""

    def change(label: WeakLabel) -> WeakLabel:
        others = [lobe for lobe in Lobe if lobe is not label.lobe]
        wrong = others[int(rng.integers(len(others)))]
        return replace(label, lobe=wrong) if rng.random() < share else label

    return each_label(weak, change)


def shifted_slices(
    sigma_mm: float, weak: Sequence[WeakStudy], rng: np.random.Generator
) -> list[WeakStudy]:
    """Records whose slices are off by a normal distance of this standard deviation."""

    def change(label: WeakLabel) -> WeakLabel:
        assert label.z_lps_mm is not None
        return replace(label, z_lps_mm=label.z_lps_mm + rng.normal(0, sigma_mm))

    return each_label(weak, change)


def each_label(
    weak: Sequence[WeakStudy], change: Callable[[WeakLabel], WeakLabel]
) -> list[WeakStudy]:
    return [replace(item, labels=tuple(map(change, item.labels))) for item in weak]


NULL, ALL = replace(PAPER, null=0.1), EmConfig()
VARIANTS = (
    Variant("detector alone", PAPER, ()),
    Variant("+ slice", PAPER, ("z_lps_mm",)),
    Variant("+ lobe", PAPER, ("lobe",)),
    Variant("slice and lobe (paper)", PAPER),
    Variant("paper + null", NULL),
    Variant("paper + odds", replace(PAPER, odds=True)),
    Variant("paper + null + joint", replace(NULL, joint=True)),
    Variant("paper + null + size", replace(NULL, size=True)),
    Variant("paper + null + attenuation", replace(NULL, attenuation=True)),
    Variant("paper + null + odds", replace(NULL, odds=True)),
    Variant("paper + null + odds, certain", replace(NULL, odds=True, certain=ALL.certain)),
    Variant("all (default of training)", ALL),
    Variant("all, kind not recorded", ALL, ("lobe", "z_lps_mm", "diameter_mm")),
    *(
        Variant(f"{100 * share:.0f} % wrong lobes: {name}", config,
                noise=partial(wrong_lobes, share))
        for share in (0.1, 0.2, 0.4)
        for name, config in (("paper", PAPER), ("all", ALL),
                             ("all + noise model", replace(ALL, wrong_lobe=share)))
    ),
    *(
        Variant(f"slices off by {sigma_mm:g} mm: {name}", config,
                noise=partial(shifted_slices, sigma_mm))
        for sigma_mm in (2.5, 5.0, 10.0)
        for name, config in (("paper", PAPER), ("all", ALL),
                             ("all + noise model", replace(ALL, slice_off_mm=sigma_mm)))
    ),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="phantoms and models")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--model", type=Path, help="for all seeds, instead of warm starts")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    size, seeds = Size(), range(options.seeds)
    make_phantoms(options.work, size, seeds, options.jobs)
    tasks = [(measure, (options.work, size, seed, options.model)) for seed in seeds]
    write_report(options.out, size, run_all(tasks, options.jobs, "seeds"))


def measure(work: Path, size: Size, seed: int, model: Path | None) -> dict[str, Any]:
    """All variants on the weak scans of one seed: hit or miss and null of every label."""
    torch.set_num_threads(1)
    scans = scans_of(work, size, seed)
    network = fused(load_model(model or warm_start(work, size, seed))[0])
    cache = ScanCache(work / "cache")
    rows = {
        item.study.series_uid: to_rows(found)
        for item, found in propose_all(network, scans.weak, cache, torch.device("cpu"),
                                       EmConfig.min_logit)
        if not isinstance(found, InputError)
    }  # fmt: skip
    return {
        variant.name: quality(scans.weak, scans.hidden, rows, cache, variant, seed)
        for variant in VARIANTS
    }


def quality(
    weak: Sequence[WeakStudy],
    hidden: Sequence[LabelledStudy],
    rows: dict[str, list[list[float]]],
    cache: ScanCache,
    variant: Variant,
    seed: int,
) -> dict[str, list[float]]:
    """For every label: whether its nodule is proposed, the best guess right, and used for training.

    posterior: of that guess; null: of the null hypothesis.
    """
    truth = {item.study.series_uid: item.nodules for item in hidden}
    told = variant.noise(weak, np.random.default_rng([seed, 2])) if variant.noise else weak
    hide: dict[str, Any] = dict.fromkeys(
        {"lobe", "z_lps_mm", "diameter_mm", "attenuation"} - {*variant.fields}
    )
    told = each_label(told, lambda label: replace(label, **hide))
    model = first_model(variant.config)
    explained = explain_all(told, rows, cache, model, variant.config, seed, 1)
    original = {item.study.series_uid: item.labels for item in weak}
    found: dict[str, list[float]] = {name: [] for name in FOUND}
    for item in explained:
        uid = item.scan.series_uid
        for at, label in enumerate(original[uid]):
            hits = hits_of(item.proposals, nodule_of(label.z_lps_mm, truth[uid]))
            row = item.posterior.posterior[at]
            found["proposed"].append(float(hits.any()))
            found["right"].append(float(bool(len(row)) and bool(hits[row.argmax()])))
            found["used"].append(float(bool(item.chosen[at])))
            found["posterior"].append(float(row.max()) if len(row) else 0.0)
            found["null"].append(float(item.posterior.null[at]))
    return found


def write_report(out: Path, size: Size, results: list[dict[str, Any]]) -> None:
    pooled = {
        variant.name: {
            key: np.concatenate([result[variant.name][key] for result in results]) for key in FOUND
        }
        for variant in VARIANTS
    }
    proposed = pooled[VARIANTS[0].name]["proposed"]
    lines = [
        f"{len(results)} seeds, {len(proposed)} labels of {size.weak} weak mini phantoms each; "
        f"{proposed.mean():.0%} of the nodules are among the proposals. Precision: share of used "
        "labels whose most probable proposal hits the nodule (mean over the seeds, lowest and "
        "highest); used: what teaches a nodule.",
        "",
        "| E-step | precision | labels used | right picks of all labels |",
        "|---|---|---|---|",
    ]
    by_seed = {}
    for variant in VARIANTS:
        each = [shares(result[variant.name]) for result in results]
        by_seed[variant.name] = each
        precision, used, picked = np.array([list(one.values()) for one in each]).T
        spread = f"{precision.mean():.2f} ({precision.min():.2f} to {precision.max():.2f})"
        lines.append(f"| {variant.name} | {spread} | {used.mean():.2f} | {picked.mean():.2f} |")
    curves = {name: coverage_against_precision(pooled[name]) for name in
              ("slice and lobe (paper)", "paper + null", "paper + null + odds",
               "all (default of training)")}  # fmt: skip
    coverage_plot(curves, out / "e_step_quality.png")
    write_json(out / "e_step_quality.json", {"machine": machine(), "seeds": by_seed})
    with atomic_path(out / "e_step_quality.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def shares(found: dict[str, list[float]]) -> dict[str, float]:
    """Of one seed: right of the labels used, used of all, both of all."""
    right, used = (np.array(found[key]) > 0 for key in ("right", "used"))
    return {
        "precision": float(right[used].mean()),
        "used": float(used.mean()),
        "right_and_used": float((right & used).mean()),
    }


def coverage_against_precision(found: dict[str, np.ndarray]) -> list[tuple[float, float]]:
    """(share of labels used, precision) for every limit on the posterior of the best guess."""
    right = found["right"][np.argsort(-found["posterior"], kind="stable")]
    count = np.arange(1, len(right) + 1)
    return list(zip((count / len(right)).tolist(), (right.cumsum() / count).tolist(), strict=True))


if __name__ == "__main__":
    main()
