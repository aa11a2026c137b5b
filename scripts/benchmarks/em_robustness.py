"""What is left of EM's gain when the records are wrong, coarse or missing.

python scripts/benchmarks/em_robustness.py --work DIR    after em_gain.py, whose warm starts and
                                                         strong-only arms it shares

Wrong lobes, slices off by a normal distance, and labels that nobody wrote down (the scan then looks
clean where its record is silent). Writes em_robustness.json, .md and .png into results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from e_step_quality import shifted_slices, wrong_lobes
from em_gain import ARMS
from em_study import (
    RESULTS,
    Arm,
    Size,
    in_words,
    machine,
    make_phantoms,
    paired,
    run_all,
    run_arm,
)

from deepem.em import EmConfig
from deepem.figures import curves_with_intervals
from deepem.files import atomic_path, write_json
from deepem.labelled import WeakStudy

STRONG_ONLY = ARMS[0]
CLEAN = next(arm for arm in ARMS if arm.name == "MAP, extended")


def missing_labels(
    share: float, weak: Sequence[WeakStudy], rng: np.random.Generator
) -> list[WeakStudy]:
    """Records without a share of their nodules; a scan that loses all of them is not used."""
    kept = []
    for item in weak:
        labels = tuple(label for label in item.labels if rng.random() >= share)
        if labels:
            kept.append(replace(item, labels=labels))
    return kept


CURVES: dict[str, dict[float, Arm]] = {
    "wrong lobes (share)": {
        level: Arm(
            f"wrong-lobe-{level:g}", EmConfig(wrong_lobe=level), records=partial(wrong_lobes, level)
        )
        for level in (0.2, 0.4)
    },
    "slices off (mm, standard deviation)": {
        level: Arm(
            f"slice-{level:g}mm",
            EmConfig(slice_off_mm=level),
            records=partial(shifted_slices, level),
        )
        for level in (5.0, 10.0)
    },
    "labels missing (share)": {
        level: Arm(f"missing-{level:g}", EmConfig(), records=partial(missing_labels, level))
        for level in (0.1, 0.4, 0.8)
    },
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="as for em_gain.py")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="arms at once, one thread each")
    parser.add_argument("--ends", action="store_true", help="of every curve the worst level alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    size, seeds, work = Size(), range(options.seeds), options.work
    make_phantoms(work, size, seeds, options.jobs)
    curves = {name: {0.0: CLEAN} | {level: arms[level] for level in
                                    ([max(arms)] if options.ends else arms)}
              for name, arms in CURVES.items()}  # fmt: skip
    arms = [STRONG_ONLY, *{arm.name: arm for of in curves.values() for arm in of.values()}.values()]
    tasks = [(run_arm, (work, size, seed, arm)) for seed in seeds for arm in arms]
    write_report(options.out, curves, run_all(tasks, options.jobs, "arms"))


def write_report(
    out: Path, curves: dict[str, dict[float, Arm]], results: list[dict[str, Any]]
) -> None:
    def cpm(arm: Arm) -> dict[int, float]:
        return {r["seed"]: r["test"]["cpm"] for r in results if r["arm"] == arm.name}

    def precision(arm: Arm) -> float:
        return float(
            np.mean([r["rounds"][-1]["precision"] for r in results if r["arm"] == arm.name])
        )

    base = cpm(STRONG_ONLY)
    lines = [
        f"Gain of EM in CPM over strong-only, {len(base)} seed(s), the set-up of em_gain.md; 95 % "
        "interval; precision of the picks in the last round.",
        "",
        "| records | level | gain (95 %) | precision |",
        "|---|---|---|---|",
    ]
    gains = {name: {level: paired(cpm(arm), base) for level, arm in arms.items()}
             for name, arms in curves.items()}  # fmt: skip
    for name, arms in curves.items():
        for level, arm in arms.items():
            gain = in_words(gains[name][level])
            lines.append(f"| {name} | {level:g} | {gain} | {precision(arm):.2f} |")
    curves_with_intervals(gains, "CPM beyond strong-only", out / "em_robustness.png")
    write_json(out / "em_robustness.json", {"machine": machine(), "runs": results})
    with atomic_path(out / "em_robustness.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
