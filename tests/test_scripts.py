"""The newcomer's two commands, without installing anything, and the speed benchmark in small."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))

import demo_pacs  # noqa: E402
import environment  # noqa: E402
import orthanc  # noqa: E402
import start  # noqa: E402

posix = pytest.mark.skipif(os.name == "nt", reason="process groups and links of POSIX")


# --- the Python that it is called with


@pytest.mark.parametrize("version", [(3, 10), (3, 11), (3, 12)])
def test_a_supported_python_is_accepted(version):
    environment.check_python(version)


@pytest.mark.parametrize("version", [(3, 9), (3, 13), (4, 0)])
def test_another_python_is_refused_with_what_to_do(version):
    with pytest.raises(
        environment.SetupError, match=rf"Python {version[0]}\.{version[1]} is not.*3\.10, 3\.11"
    ):
        environment.check_python(version)


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_python_without_venv_is_told_what_to_install(missing, monkeypatch):
    monkeypatch.setattr(
        environment.importlib.util, "find_spec", lambda name: None if name == missing else object()
    )
    with pytest.raises(environment.SetupError, match=rf"no module {missing}.*apt install python3"):
        environment.check_python()


def test_supported_pythons_are_those_of_the_package():
    declared = re.search(r'requires-python = "(.*)"', (ROOT / "pyproject.toml").read_text())[1]
    first, last = environment.SUPPORTED[0], environment.SUPPORTED[-1]
    assert declared == f">={first[0]}.{first[1]},<{last[0]}.{last[1] + 1}"


# --- the virtual environment


class Installer:
    """Stands in for `subprocess.run`: makes the interpreter, counts, and fails when told to."""

    def __init__(self):
        self.calls = []
        self.fails_at = None

    def __call__(self, command, **kwargs):
        what = "venv" if "venv" in command else "pip"
        self.calls.append(what)
        if what == "venv":
            python = Path(command[-1]) / "bin" / "python"
            python.parent.mkdir(parents=True, exist_ok=True)
            python.unlink(missing_ok=True)
            python.symlink_to(sys.executable)
        return SimpleNamespace(returncode=1 if what == self.fails_at else 0)


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "a folder with spaces"
    root.mkdir()
    for name in ("requirements.txt", "constraints.txt"):
        (root / name).write_text("numpy==1.26.4\n")
    return root


@posix
def test_the_environment_is_made_once_and_then_reused(checkout):
    installer = Installer()
    python = environment.ready_python(checkout, installer)
    assert python == checkout / ".venv/bin/python"
    assert environment.ready_python(checkout, installer) == python
    assert installer.calls == ["venv", "pip"]


@posix
@pytest.mark.parametrize("name", ["requirements.txt", "constraints.txt"])
def test_changed_pins_are_installed_into_the_same_environment(checkout, name):
    installer = Installer()
    environment.ready_python(checkout, installer)
    (checkout / name).write_text("numpy==1.26.5\n")
    environment.ready_python(checkout, installer)
    environment.ready_python(checkout, installer)
    assert installer.calls == ["venv", "pip", "pip"]


@posix
def test_an_interrupted_installation_is_taken_up_again(checkout):
    installer = Installer()
    installer.fails_at = "pip"
    with pytest.raises(environment.SetupError, match="installation failed"):
        environment.ready_python(checkout, installer)
    installer.fails_at = None
    environment.ready_python(checkout, installer)
    assert installer.calls == ["venv", "pip", "pip"]


@posix
def test_a_failed_update_leaves_no_stamp_of_the_old_pins(checkout):
    installer = Installer()
    environment.ready_python(checkout, installer)
    before = (checkout / "constraints.txt").read_text()
    (checkout / "constraints.txt").write_text("numpy==1.26.5\n")
    installer.fails_at = "pip"
    with pytest.raises(environment.SetupError):
        environment.ready_python(checkout, installer)
    (checkout / "constraints.txt").write_text(before)  # half of the update may be installed
    installer.fails_at = None
    environment.ready_python(checkout, installer)
    assert installer.calls == ["venv", "pip", "pip", "pip"]


@posix
def test_a_moved_checkout_gets_a_new_environment(checkout):
    installer = Installer()
    environment.ready_python(checkout, installer)
    moved = checkout.rename(checkout.with_name("elsewhere"))
    environment.ready_python(moved, installer)
    assert installer.calls == ["venv", "pip", "venv", "pip"]


@posix
def test_a_python_that_is_gone_is_replaced(checkout):
    installer = Installer()
    (environment.ready_python(checkout, installer)).unlink()
    environment.ready_python(checkout, installer)
    assert installer.calls == ["venv", "pip", "venv", "pip"]


def test_programs_of_the_environment_come_first_on_the_path(tmp_path):
    path = environment.variables(tmp_path / "bin" / "python")["PATH"]
    assert path.split(os.pathsep)[0] == str(tmp_path / "bin")


def test_every_direct_dependency_is_pinned_as_in_the_constraints():
    def pins(name):
        lines = (ROOT / name).read_text().lower().splitlines()
        return [line for line in lines if line and not line.startswith(("#", "-e"))]

    direct = pins("requirements.txt")
    assert all("==" in line for line in direct)
    assert set(direct) <= set(pins("constraints.txt"))
    assert (ROOT / "requirements.txt").read_text().splitlines()[-1] == "-e ."


# --- the server


def test_a_port_in_use_is_one_line_for_the_user():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        asked = [sys.executable, SCRIPTS / "start.py", "--port", str(port)]
        done = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=30)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"port {port}" in line and "--port" in line


def test_a_free_port_is_accepted():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start.check_port("127.0.0.1", port, "--port")


def test_a_missing_studies_folder_is_refused_and_an_address_is_not(tmp_path):
    start.check_studies(None)
    start.check_studies(str(tmp_path))
    start.check_studies("http://127.0.0.1:8042/dicom-web")
    with pytest.raises(environment.SetupError, match="no such folder"):
        start.check_studies(str(tmp_path / "missing"))


SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[2], "w").write(str(child.pid))
class Info(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/info/" else 404)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Info).serve_forever()
"""


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return state.stdout.strip()[:1] not in ("", "Z")


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_is_waited_for_and_its_children_end_with_it(tmp_path, number, request):
    # Where a shell started the tests in the background, Ctrl-C is ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVER, str(port), str(tmp_path / "child")]
    with pytest.raises(KeyboardInterrupt), start.running(command, dict(os.environ)) as server:
        start.wait_until_ready(server, f"http://127.0.0.1:{port}")
        child = int((tmp_path / "child").read_text())
        assert _is_alive(child)
        os.kill(os.getpid(), number)
        time.sleep(10)  # ended by the signal
    deadline = time.monotonic() + 5
    while _is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.returncode is not None
    assert not _is_alive(child)


def test_a_server_that_ends_at_once_is_an_error_and_no_endless_wait():
    with (
        start.running([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) as server,
        pytest.raises(environment.SetupError, match="stopped with code 3"),
    ):
        start.wait_until_ready(server, "http://127.0.0.1:9")


def test_arguments_after_two_dashes_belong_to_the_server():
    asked = ["--port", "9", "--", "--conf", "a", "--"]
    assert start.split(asked) == (["--port", "9"], ["--conf", "a", "--"])
    assert start.split(["--port", "9"]) == (["--port", "9"], [])


# --- the PACS


@pytest.mark.parametrize(
    ("program", "plugin", "missing"),
    [
        (None, Path("plugin.so"), "orthanc"),
        ("Orthanc", None, "orthanc-dicomweb"),
        (None, None, "orthanc orthanc-dicomweb"),
    ],
)
def test_missing_packages_are_one_line_before_anything_is_made(
    monkeypatch, program, plugin, missing
):
    monkeypatch.setattr(orthanc, "_program", lambda: program)
    monkeypatch.setattr(orthanc, "_plugin", lambda: plugin)
    monkeypatch.setattr(demo_pacs, "ready_python", lambda: pytest.fail("too early"))
    with pytest.raises(environment.SetupError) as caught:
        demo_pacs.main([])
    assert str(caught.value) == (
        f"not installed: {missing} (Debian, Ubuntu: sudo apt install {missing})"
    )


def test_a_folder_that_is_not_there_and_two_servers_at_one_port_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_pacs, "check_installed", lambda: None)
    monkeypatch.setattr(demo_pacs, "check_port", lambda *asked: None)
    monkeypatch.setattr(demo_pacs, "ready_python", lambda: pytest.fail("too early"))
    with pytest.raises(environment.SetupError, match="missing: no such folder"):
        demo_pacs.main(["--dicom", str(tmp_path / "missing")])
    with pytest.raises(environment.SetupError, match="--pacs-port"):
        demo_pacs.main(["--port", "8042"])


def test_only_dicom_files_are_sent_and_what_is_not_taken_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    good, bad = tmp_path / "deep" / "er" / "IM1", tmp_path / "IM2"
    for file in (good, bad):
        file.write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "notes.txt").write_text("no DICOM")
    sent = []
    monkeypatch.setattr(
        demo_pacs, "store", lambda pacs, files: sent.extend(files) or {bad: "400 Bad Request"}
    )
    demo_pacs.fill(orthanc.Orthanc("http://127.0.0.1:1"), tmp_path)
    assert sorted(sent) == sorted([good, bad])
    said = capsys.readouterr().out
    assert f"from {tmp_path}: 1\n" in said and f"not taken: {bad}: 400 Bad Request" in said


# --- the benchmark


@pytest.mark.slow
def test_the_benchmark_measures_time_and_memory_of_a_small_volume(tmp_path):
    command = [sys.executable, SCRIPTS / "benchmarks" / "inference.py", "--edge-mm", "64"]
    command += ["--contenders", "deepem-float32", "--threads", "1", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "inference.json").read_text())["contenders"]["deepem-float32"]
    assert 0 < result["counted_s"] < 60
    assert 0.2 < result["peak_gib"] < 4
    assert "DeepEM, float32" in (tmp_path / "inference.md").read_text()
