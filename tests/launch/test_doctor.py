"""`hydrazero doctor`: true facts, advice on what is missing, and a report whatever is broken."""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hydrazero.launch.cli.main import main
from hydrazero.launch.doctor import devices, machine, software
from hydrazero.launch.doctor.findings import Finding, Probe, ProbeError, find_all, run_python


def doctor(*options: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *options])


def test_the_report_is_true():
    result = doctor("--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.output)
    assert report["Versions"]["torch"] == version("torch") and platform.python_version() in report["Versions"]["Python"]
    assert report["Machine"]["cores"].startswith(f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} ")
    assert report["Launchers"]["DeepSpeed"] == "can be imported"
    assert report["Devices"]["CPU kernels"] == "compiled and loaded" and "CPU kernels" not in report["Missing"]
    assert report["Optional parts"]["formats"] == "installed"
    assert "does not work" not in result.output and report["Devices"]["device"].startswith(("CPU", "cuda", "xpu"))
    for name, advice in report["Missing"].items():
        assert advice and any(name in section for section in report.values())


def test_whatever_is_broken_becomes_a_sentence(monkeypatch):
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    def broken(code: str) -> str:
        raise ProbeError("does not work (ImportError: libmpi.so.40 is missing)")

    def refuse(*_: object, **__: object) -> str:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(software, "version", absent)
    monkeypatch.setattr(software, "requires", absent)
    monkeypatch.setattr(software, "run_python", broken)
    monkeypatch.setattr(devices, "run_python", broken)
    monkeypatch.setattr(machine.shutil, "disk_usage", refuse)
    monkeypatch.setattr(machine, "_cpu_facts", refuse)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    result = doctor()
    assert result.exit_code == 0 and "Traceback" not in result.output, result.output
    for text in (
        "libmpi.so.40 is missing",
        "hydrazero needs torch: pip install torch",
        "install a C++ compiler",
        "not known (PermissionError: [Errno 13] Permission denied)",
        "/nowhere/c++ does not work",
        "optional parts  not known (PackageNotFoundError",
    ):
        assert text in result.output, result.output


def test_missing_parts_are_named_with_the_command_that_installs_them(monkeypatch):
    monkeypatch.setattr(software, "requires", lambda _: ['absent-package>=2 ; extra == "search"', "numpy>=1"])
    (found,) = find_all(software.optional_probes())
    assert (found.name, found.value) == ("search", "without absent-package")
    assert found.missing == "needed for hydrazero search; pip install 'hydrazero[search]'"
    monkeypatch.setattr(software, "requires", lambda _: ['numpy>=99 ; extra == "search"'])
    (found,) = find_all(software.optional_probes())
    assert found.value == f"without numpy >=99 (found {version('numpy')})"


def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(devices, "run_python", lambda _: "CUDA 12.8\ncuda\nNVIDIA H200, 150 GB\nNVIDIA H200, 150 GB")
    found = find_all(devices.device_probes())[0]
    assert found.value == "cuda: 2 x NVIDIA H200, 150 GB; PyTorch is built for CUDA 12.8" and not found.missing
    monkeypatch.setattr(devices, "run_python", lambda _: "CPUs only\ncpu")
    monkeypatch.setattr(devices, "_gpu_files", lambda: True)
    found = find_all(devices.device_probes())[0]
    assert found.value == "CPU; PyTorch is built for CPUs only and sees no GPU" and "pytorch.org" in found.missing


def test_little_shared_memory_is_reported(monkeypatch):
    usage = shutil.disk_usage("/")._replace(total=64_000_000, free=64_000_000)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: usage)
    found = {one.name: one for one in find_all(machine.machine_probes())}["/dev/shm"]
    assert found.value.startswith("0.06 GB") and "--shm-size" in found.missing


@pytest.mark.parametrize(
    "code, words", [("import absent_module", "No module named"), ("import os; os.abort()", "exit")]
)
def test_libraries_that_break_end_another_process(code, words):
    with pytest.raises(ProbeError, match=words):
        run_python(code)


def test_a_probe_may_return_a_finding_of_its_own():
    probes = [
        Probe(name="a", find=lambda: "1"),
        Probe(name="b", find=lambda: Finding(name="b", value="2", missing="c")),
    ]
    assert find_all(probes) == [Finding(name="a", value="1"), Finding(name="b", value="2", missing="c")]
    assert find_all([Probe(name="x", find=lambda: Path("/absent").read_text(), missing="do y")])[0].missing == "do y"
