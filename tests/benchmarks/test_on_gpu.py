"""What the script for a GPU would run, in which order."""

import os
import re
import subprocess
from pathlib import Path

from benchmarks.measured import EIGHT_BITS

ROOT = Path(__file__).parents[2]


def commands(tmp_path, stage):
    """What the stage would call Python with on a GPU: a line each."""
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(f"""#!/usr/bin/env bash
if [ "$1" = -c ]; then echo 1; else (IFS="|"; echo "$*|" >> {log}); fi
""")
    python.chmod(0o755)
    log.unlink(missing_ok=True)
    command = ["bash", ROOT / "benchmarks" / "on_gpu.sh", stage]
    env = os.environ | {"PYTHON": str(python), "OUT": str(tmp_path / "out")}
    subprocess.run(command, env=env, check=True, capture_output=True)
    return log.read_text().splitlines()


def test_the_stage_of_eight_bits_begins_with_the_marks(tmp_path):
    """B first, in the modes that are compared; then the other modes; every operation last."""
    *models, kernels = [c for c in commands(tmp_path, "eight-bits") if "|benchmarks/" in c]
    networks = ["DeiT-B distilled", "DeiT-B-384 distilled", "DeiT-S distilled"]
    assert [re.search(r"--rows\|([^|]*)", c)[1] for c in models] == 2 * networks
    first, *_, last = ({*re.search(r"--modes\|([^|]*)", c)[1].split(",")} for c in models)
    for fp8, compared in (("fp8", "bf16"), ("engine_fp8", "engine_bf16")):
        assert {f"deit_fast_{fp8}", f"deit_fast_{compared}"} <= first
    assert "torchao_fp8_compile" in first and first | last >= {*EIGHT_BITS.values()}
    assert "|-k|not backward|" in kernels
    assert {"quantize", "quantized_linear"} <= {*re.findall(r"/bench_(\w+).py", kernels)}
    assert not any("quantize" in c for c in commands(tmp_path, "kernels"))
