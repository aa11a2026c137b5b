"""How long other requests wait while the real server searches a scan, with threads and without.

Both contenders are this app; in the second, requests run in the event loop of the server, as in any
other MONAI Label app. Meanwhile a second client asks for the state of the server and for the next
sample, one after the other, with a pause between.

    .venv/bin/python scripts/benchmarks/responsiveness.py    # about 3 minutes on 2 cores
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import requests

HERE = Path(__file__).resolve().parent
APP = HERE.parents[1] / "apps" / "deepem_app"
MODEL = "nodule_detection"
START_S = 180
PAUSE_S = 0.05
CONTENDERS = {"threads": "this app", "event loop": "requests in the event loop (stock)"}
WITHOUT_THREADS = "def InThreads(app, prefix):\n    return app\n"
QUESTIONS = {"info": "`/info/`", "next": "next sample"}


def main() -> None:
    """Measure both, print the table, write `responsiveness.json` and `responsiveness.md`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=("mini", "full"), default="full", help="of the phantom")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="(beside this script)")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        scan = Path(folder) / "scan.nii"
        voxels = make_scan(scan, options.size)
        for name in CONTENDERS:
            print(f"{CONTENDERS[name]} ...", file=sys.stderr, flush=True)
            results[name] = measure(Path(folder) / name.replace(" ", "_"), scan, name == "threads")
    report = {
        "machine": {
            "processors": os.cpu_count(),
            "load_before": round(load, 2),
            "python": platform.python_version(),
        },
        "voxels": voxels,
        "contenders": results,
    }
    text = markdown(report)
    print(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "responsiveness.json").write_text(json.dumps(report, indent=2) + "\n")
    (options.out / "responsiveness.md").write_text(text)


def make_scan(path: Path, size: str) -> list[int]:
    """Write a synthetic chest; the number of its voxels along each axis."""
    import nibabel as nib

    from deepem.geometry import RAS_TO_LPS
    from deepem.phantom import make_phantom

    phantom = make_phantom(0, size)
    nib.save(nib.Nifti1Image(phantom.hu, RAS_TO_LPS @ phantom.grid.affine_lps_mm), path)
    return list(phantom.hu.shape)


def measure(root: Path, scan: Path, threads: bool) -> dict:
    """Of one contender: how long a search takes, and what others wait with and without one."""
    root.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "bin", "logs", MODEL, f"{MODEL}.pt")
    app = shutil.copytree(APP, root / "app", ignore=ignore)
    if not threads:
        (app / "lib" / "threads.py").write_text(WITHOUT_THREADS)
    studies = root / "studies"
    studies.mkdir()
    for name in ("first", "second", "third"):
        shutil.copy(scan, studies / f"{name}.nii")
    with serving(app, studies, root) as url:
        search(url, "first")  # loads the model
        idle = waits(url, until=after(3.0))
        started = time.perf_counter()
        searching = threading.Thread(target=search, args=(url, "second"))
        searching.start()
        time.sleep(0.2)
        busy = waits(url, until=lambda: not searching.is_alive())
        searching.join()
        return {
            "search_s": round(time.perf_counter() - started, 2),
            "idle": {name: summary(seconds) for name, seconds in idle.items()},
            "searching": {name: summary(seconds) for name, seconds in busy.items()},
        }


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def search(url: str, image: str) -> None:
    requests.post(f"{url}/infer/{MODEL}?image={image}&output=json", timeout=600).raise_for_status()


def waits(url: str, until: Callable[[], bool]) -> dict[str, list[float]]:
    """Seconds that each question took, asked one after the other."""
    seconds: dict[str, list[float]] = {name: [] for name in QUESTIONS}
    with requests.Session() as client:
        while not until():
            for name in QUESTIONS:
                started = time.perf_counter()
                if name == "info":
                    answer = client.get(f"{url}/info/", timeout=600)
                else:
                    answer = client.post(f"{url}/activelearning/first", json={}, timeout=600)
                answer.raise_for_status()
                seconds[name].append(time.perf_counter() - started)
                time.sleep(PAUSE_S)
    return seconds


def summary(seconds: list[float]) -> dict:
    ms = np.array(seconds) * 1000
    return {
        "answers": len(ms),
        "median_ms": round(float(np.median(ms)), 1),
        "p95_ms": round(float(np.percentile(ms, 95)), 1),
        "worst_ms": round(float(ms.max()), 1),
        "share_below_100_ms": round(float((ms < 100).mean()), 4),
    }


@contextmanager
def serving(app: Path, studies: Path, root: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "monailabel.main", "start_server"]
    command += ["--app", str(app), "--studies", str(studies)]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=root, stdout=log, stderr=subprocess.STDOUT)
        try:
            ready = after(START_S)
            while not _answers(url):
                if server.poll() is not None or ready():
                    raise SystemExit((root / "log").read_text()[-4000:])
                time.sleep(0.5)
            yield url
        finally:
            for child in psutil.Process(server.pid).children(recursive=True):
                child.kill()
            server.kill()
            server.wait()


def _answers(url: str) -> bool:
    try:
        return requests.get(f"{url}/info/", timeout=10).ok
    except requests.ConnectionError:
        return False


def markdown(report: dict) -> str:
    """The table of a report, and what was measured."""
    machine = report["machine"]
    lines = [
        "# Other requests while a scan is searched",
        "",
        f"{machine['processors']} cores, load {machine['load_before']} before the start. "
        f"Synthetic chest of {' x '.join(map(str, report['voxels']))} voxels.",
        "",
        "| | search s | question | answers | median ms | 95 % ms | worst ms | below 100 ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, result in report["contenders"].items():
        for when, label in (("searching", f"{result['search_s']}"), ("idle", "none")):
            for question, text in QUESTIONS.items():
                row = result[when][question]
                lines.append(
                    f"| {CONTENDERS[name]} | {label} | {text} | {row['answers']} "
                    f"| {row['median_ms']} | {row['p95_ms']} | {row['worst_ms']} "
                    f"| {row['share_below_100_ms']:.1%} |"
                )
    lines += [
        "",
        "One client has a scan searched; another asks, waits for the answer, pauses "
        f"{PAUSE_S * 1000:.0f} ms, and asks the other question. Rows without a search are the same "
        "server before it.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
