"""What the script for a GPU runs, in which order: with a Python that writes down its arguments."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import operations
from benchmarks.report.targets import QUANTIZED_MODES
from benchmarks.stages import plan

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
# stands for Python and compute-sanitizer; the stages themselves run for real
RECORD = """#!/usr/bin/env bash
case "$0 $1 $2" in
*python\\ -m\\ benchmarks.stages) exec {python} "$@" ;;
*python\\ -c*) echo {gpu} ;;
*python*) (IFS="|"; echo "$*" >> {log}); exit {status} ;;
*) (IFS="|"; echo "compute-sanitizer|$*|$PYTORCH_NO_CUDA_MEMORY_CACHING" >> {log}) ;;
esac
"""
EXPECTED = Path(__file__).with_name("on_gpu_commands.txt").read_text()


def run(tmp_path, *stages, gpu=True, status=0, script=SCRIPT):
    """The finished script, and what it would call on a machine with or without a GPU: lines."""
    log = tmp_path / "log"
    log.write_text("")
    text = RECORD.format(python=sys.executable, gpu=int(gpu), log=log, status=status)
    for name in ("python", "compute-sanitizer"):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    env = os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out")}
    env["PATH"] = os.pathsep.join([str(tmp_path), env["PATH"]])
    done = subprocess.run(["bash", script, *stages], env=env, capture_output=True, text=True)
    return done, log.read_text().splitlines()


def without_paths(line, tmp_path):
    """Without what differs between runs, what every benchmark has, and tests of the kernels."""
    line = line.replace(str(tmp_path / "python"), "PYTHON")
    line = line.replace(f"|--out|{tmp_path / 'out'}", "")
    line = re.sub(r"\|--minutes\|7\.\d+", "", line)
    line = re.sub(r"\|-k\|\(.*\|", "|-k|...|", line)  # compute-sanitizer's
    line = line.replace("|--benchmark-columns=median,mean,rounds", "")
    return "|".join(word for word in line.split("|") if not word.startswith("tests/"))


@pytest.mark.parametrize("gpu", [False, True], ids=["CPU", "GPU"])
def test_every_stage_runs_what_it_should(tmp_path, gpu):
    """All of them in turn; which tests they name is looked at below."""
    done, lines = run(tmp_path, *plan.NAMES, gpu=gpu)
    assert done.returncode == 0, done.stdout + done.stderr
    cpu, gpus = EXPECTED.split("== GPU\n")
    expected = gpus if gpu else cpu.removeprefix("== CPU\n")
    assert [without_paths(line, tmp_path) for line in lines] == expected.splitlines()
    ended = re.findall(r"^(\S+): \d+ s$", done.stdout, re.MULTILINE)
    assert ended == list(plan.NAMES)


def test_quantized_begins_with_the_targets(tmp_path):
    """B first, in the modes that are compared; then the other modes; every operation last."""
    _, lines = run(tmp_path, "quantized")
    *models, kernels = [line for line in lines if "|benchmarks/" in line]
    networks = ["DeiT-B distilled", "DeiT-B-384 distilled", "DeiT-S distilled"]
    assert [re.search(r"--rows\|([^|]*)", c)[1] for c in models] == 2 * networks
    first, *_, last = ({*re.search(r"--modes\|([^|]*)", c)[1].split(",")} for c in models)
    for fp8, compared in (("fp8", "bf16"), ("engine_fp8", "engine_bf16")):
        assert {f"deit_fast_{fp8}", f"deit_fast_{compared}"} <= first
    assert "torchao_fp8_compile" in first and first | last >= {*QUANTIZED_MODES.values()}
    assert kernels.endswith("|-k|not backward")
    assert {"quantize", "quantized_linear"} <= {*re.findall(r"/bench_(\w+).py", kernels)}
    assert not any("bench_quantize" in line for line in run(tmp_path, "kernels")[1])


def test_the_files_of_the_commands_are_there(tmp_path):
    _, lines = run(tmp_path, *plan.NAMES)
    words = {word for line in lines for word in line.split("|")}
    paths = {word for word in words if word.startswith(("tests/", "benchmarks/"))}
    assert len(paths) > 20 and not [path for path in paths if not (ROOT / path).exists()]


def test_the_sanitized_tests_are_there():
    """A name that no test of the kernels has would drop out without a word."""
    sources = [path.read_text() for path in (ROOT / "tests" / "kernels").rglob("test_*.py")]
    names = re.findall(r"^def (test_\w+)", "\n".join(sources), re.MULTILINE)
    for chosen in (*plan.SANITIZED, *plan.SANITIZED_QUANTIZED):
        part = chosen.split()[0]
        assert any(part in name for name in names), part


def test_a_failure_shows_in_the_status_and_stops_nothing(tmp_path):
    done, lines = run(tmp_path, "correctness", "peak-rates", status=3)
    assert done.returncode == 1 and len(lines) == 3
    assert (tmp_path / "out" / "correctness.log").exists()


@pytest.mark.parametrize(
    ("stages", "message"),
    [([], "expected stages, of: correctness"), (["dance"], "no stage dance, expected one of")],
)
def test_on_gpu_names_its_stages(stages, message):
    done = subprocess.run(["bash", SCRIPT, *stages], capture_output=True, text=True)
    assert done.returncode == 2 and message in done.stderr


def test_a_checkout_needs_no_installation(tmp_path):
    """The kernels are linked into the package while the stages run; earlier results are copied."""
    checkout = tmp_path / "checkout"
    for name in ("benchmarks/results/chip", "deit_fast", "kernels"):
        (checkout / name).mkdir(parents=True)
    (checkout / "benchmarks" / "stages").symlink_to(ROOT / "benchmarks" / "stages")
    (checkout / "benchmarks" / "__init__.py").touch()
    (checkout / "benchmarks" / "results" / "chip" / "table5.json").write_text("{}")
    script = checkout / "benchmarks" / "on_gpu.sh"
    script.write_text(SCRIPT.read_text())
    record = RECORD.replace("IFS=", "ls deit_fast/kernels/ >/dev/null || exit 9; IFS=")
    text = record.format(python=sys.executable, gpu=0, log=tmp_path / "log", status=0)
    (tmp_path / "python").write_text(text)
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PYTHON": str(tmp_path / "python"), "OUT": str(tmp_path / "out")}
    command = ["bash", script, "peak-rates"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (checkout / "deit_fast" / "kernels").is_symlink()
    assert (tmp_path / "out" / "chip" / "table5.json").read_text() == "{}"


def test_every_operation_has_its_place():
    """A benchmark of an operation is in the lists that the lease and the GPU stages go through."""
    files = (ROOT / "benchmarks").glob("bench_*.py")
    compared = {p.stem.removeprefix("bench_") for p in files if "(compare" in p.read_text()}
    assert len(compared) > 10
    assert compared == set(operations.OPS)
    assert compared == {*plan.KERNELS, *plan.QUANTIZED_KERNELS}
