"""How long does "next sample" take with many scored scans?

python scripts/benchmarks/next_sample.py            10,000 scans, about a minute

The app is loaded as MONAI Label loads it, on a folder of empty image files, with a ranking that an
earlier scoring wrote. Measured is what the server does for a request, the first one after its start
and later ones, without the network: MONAI Label notes in the datastore who was given which scan.
Then the strategy alone, against one that reads its ranking at every call, and against MONAI Label's
own random strategy. Writes next_sample.json and .md into results/.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from em_study import RESULTS, machine
from monailabel.config import settings
from monailabel.endpoints.activelearning import sample
from monailabel.interfaces.utils.app import app_instance
from monailabel.tasks.activelearning.random import Random

from deepem.files import atomic_path, write_json
from deepem.ranking.strategies import DEFAULT, Ranked
from deepem.ranking.table import write_ranking

APP = Path(__file__).parents[2] / "apps" / "deepem_app"
WHY = "2 uncertain findings; the record names the right upper lobe, slice 145, but three compete"
GOAL_MS = 50.0
STRATEGY = "strategy alone"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scans", type=int, default=10_000)
    parser.add_argument("--calls", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), options.scans, options.calls)
    content = {"machine": machine(), "scans": options.scans, "calls": options.calls, "ms": rows}
    write_json(options.out / "next_sample.json", content)
    text = table(rows, options.scans, options.calls)
    with atomic_path(options.out / "next_sample.md") as part:
        part.write_text(text, encoding="utf-8")
    print(text)


def measure(folder: Path, scans: int, calls: int) -> dict[str, dict[str, float]]:
    """Milliseconds per call, by what was called: median, 95th percentile, largest."""
    studies = folder / "studies"
    studies.mkdir()
    names = [f"1.2.840.{at:06d}" for at in range(scans)]
    for name in names:
        (studies / f"{name}.nii").touch()
    (folder / "app").mkdir()
    for part in ("main.py", "lib"):
        (folder / "app" / part).symlink_to(APP / part)
    ranking = folder / "app" / "model" / "nodule_detection" / "ranking" / f"{DEFAULT}.csv"
    order = np.random.default_rng(0).permutation(scans)
    write_ranking(ranking, [Ranked(names[at], rank, 1 / rank, WHY)
                            for rank, at in enumerate(order, 1)])  # fmt: skip
    settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD = False
    settings.MONAI_LABEL_APP_DIR, settings.MONAI_LABEL_STUDIES = str(folder / "app"), str(studies)
    settings.MONAI_LABEL_APP_CONF = {"skip_scoring": "true"}
    app = app_instance()
    strategy, datastore, stock = app._strategies[DEFAULT], app.datastore(), Random()

    def request() -> None:
        assert sample(DEFAULT, {"client_id": "ann"})["why"] == WHY

    def ask() -> None:
        assert strategy({"client_id": "ann"}, datastore)["why"] == WHY

    def ask_anew() -> None:
        strategy._rankings._read.clear()
        ask()

    few = max(calls // 10, 3)
    return {
        "first request": timed(request, 1),
        "request": timed(request, few),
        STRATEGY: timed(ask, calls),
        "strategy, reading the ranking at every call": timed(ask_anew, few),
        "MONAI Label's random strategy": timed(
            lambda: stock({"strategy": "random"}, datastore), few
        ),
    }


def timed(call: Callable[[], object], times: int) -> dict[str, float]:
    spent = []
    for _ in range(times):
        started = time.perf_counter()
        call()
        spent.append(1000 * (time.perf_counter() - started))
    median, high, largest = np.percentile(spent, [50, 95, 100])
    return {"median": round(median, 2), "p95": round(high, 2), "largest": round(largest, 2)}


def table(rows: dict[str, dict[str, float]], scans: int, calls: int) -> str:
    base = rows[STRATEGY]["median"]
    lines = [
        f"{scans:,} scored scans, none labelled; {calls} calls. The goal is {GOAL_MS:g} ms.",
        "",
        "| | median, ms | 95 %, ms | largest, ms | ratio of medians |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        values = (row["median"], row["p95"], row["largest"])
        numbers = " | ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {name} | {numbers} | {row['median'] / base:.1f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
