"""What EM gains: strong-only, MAP, sampling, soft, the extensions, and the oracle.

python scripts/benchmarks/em_gain.py --work DIR    5 seeds, hours on 2 cores; goes on where it was
python scripts/benchmarks/em_gain.py --work DIR --seeds 1 --test 40    a quick look

All arms of a seed go on from the same warm start, with the same steps and the same learning rate,
which falls to zero. The oracle trains on the weak scans with their true boxes: if it does not
clearly beat strong-only, the set-up can show nothing. Writes em_gain.json, .md and .png into
results/ beside this file.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
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
    warm_start,
)

from deepem.em import PAPER, EmConfig
from deepem.figures import differences_plot
from deepem.files import atomic_path, write_json

ARMS = (
    Arm("strong-only"),
    Arm("oracle", oracle=True),
    Arm("MAP (paper)", PAPER),
    Arm("sampling (paper)", replace(PAPER, method="sampling")),
    Arm("soft", replace(PAPER, method="soft")),
    Arm("MAP, kind unknown", EmConfig(attenuation=False)),
    Arm("MAP, extended", EmConfig()),
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="phantoms, models, results")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--test", type=int, default=Size.test, help="test phantoms")
    parser.add_argument("--jobs", type=int, default=2, help="arms at once, one thread each")
    parser.add_argument("--arms", nargs="+", default=[arm.name for arm in ARMS], metavar="ARM",
                        help="some of them, strong-only and oracle among them")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    size, seeds, work = Size(test=options.test), range(options.seeds), options.work
    arms = [arm for arm in ARMS if arm.name in options.arms]
    make_phantoms(work, size, seeds, options.jobs)
    run_all([(warm_start, (work, size, seed)) for seed in seeds], options.jobs, "warm starts")
    tasks = [(run_arm, (work, size, seed, arm)) for seed in seeds for arm in arms]
    write_report(options.out, size, arms, run_all(tasks, options.jobs, "arms"))


def write_report(out: Path, size: Size, arms: list[Arm], results: list[dict[str, Any]]) -> None:
    cpm = {arm.name: {r["seed"]: r["test"]["cpm"] for r in results if r["arm"] == arm.name}
           for arm in arms}  # fmt: skip
    gains = {name: paired(values, cpm["strong-only"]) for name, values in cpm.items()}
    test = results[0]["test"]
    content = {"machine": machine(), "size": vars(size), "gains": gains, "runs": results}
    write_json(out / "em_gain.json", content)
    differences_plot(
        {name: gain for name, gain in gains.items() if name != "strong-only"},
        "CPM beyond strong-only, 95 % interval over the seeds", out / "em_gain.png",
    )  # fmt: skip
    lines = [
        f"{size.strong} marked and {size.weak} weak mini phantoms per seed, "
        f"{len(cpm['strong-only'])} seeds; warm start of {size.warm_steps} steps, then "
        f"{size.steps} in every arm; "
        f"{test['scans']} test phantoms with {test['nodules']} nodules. Steps were chosen by "
        f"{size.validation} others. One thread per arm, bfloat16 "
        f"{'on' if machine()['bfloat16'] else 'off'}, torch {machine()['torch']}.",
        "",
        "| arm | CPM, mean (each seed) | gain over strong-only (95 %) | share of oracle's gain "
        "| precision per round | coverage per round | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, values in cpm.items():
        runs = [r for r in results if r["arm"] == name]
        lines.append("| " + " | ".join([
            name,
            f"{np.mean(list(values.values())):.3f} "
            f"({', '.join(f'{value:.3f}' for value in values.values())})",
            "" if name == "strong-only" else in_words(gains[name]),
            "" if name == "strong-only" else f"{gains[name][0] / gains['oracle'][0]:.0%}",
            per_round(runs, "precision"),
            per_round(runs, "coverage"),
            f"{np.mean([run['minutes'] for run in runs]):.1f}",
        ]) + " |")  # fmt: skip
    recall = per_round([run for run in results if run["rounds"]], "recall")
    lines += ["", f"Share of true nodules among the proposals, round by round: {recall}.",
              "", "MAP, sampling and soft: Eq. 3 to 7 alone (`PAPER`). Extended: the defaults "
              "of `EmConfig`; kind unknown: nothing in the records of "
              "solid or ground glass."]  # fmt: skip
    with atomic_path(out / "em_gain.md") as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


def per_round(runs: list[dict[str, Any]], name: str) -> str:
    """Mean over the seeds for every round."""
    rounds = zip(*(run["rounds"] for run in runs), strict=True)
    return " → ".join(f"{np.mean([one[name] for one in entries]):.2f}" for entries in rounds)


if __name__ == "__main__":
    main()
