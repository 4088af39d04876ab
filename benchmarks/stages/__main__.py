"""Runs what needs a GPU, in stages meant to end within ten minutes each, without a network.

    benchmarks/on_gpu.sh STAGE...
    python -m benchmarks.stages STAGE...       the same

With fifteen minutes in all, run `python -m benchmarks.lease --out FOLDER` instead: the most
valuable of it in one command, whose steps are killed when their time is over.

A stage that is run again goes on where it stopped: rows that this build has measured on this chip
are kept. Without a GPU every stage is a smoke run. Environment: OUT, folder of results and logs
(default: benchmarks/results); PYTHON, the interpreter (default: python3); DEIT_FAST_COMMIT, the
commit where the checkout is no git repository. Exit status: 0, or 1 where something failed, or 2
for an unknown stage.
"""

import os
import signal
import sys
from pathlib import Path

from .plan import NAMES, STAGES
from .runner import RESULTS, ROOT, Runner, copy_earlier_results, importable_kernels


def main(names: list[str]) -> int:
    """Run the stages of these names in this order."""
    if not names:
        print(f"on_gpu.sh: expected stages, of: {' '.join(NAMES)}", file=sys.stderr)
        return 2
    stages = {stage.name: stage for stage in STAGES}
    for name in names:
        if name not in stages:
            expected = " ".join(NAMES)
            print(f"on_gpu.sh: no stage {name}, expected one of: {expected}", file=sys.stderr)
            return 2
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    os.chdir(ROOT)
    out = Path(os.environ.get("OUT") or RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    copy_earlier_results(out)
    with importable_kernels():
        runner = Runner(os.environ.get("PYTHON") or sys.executable, out)
        results = [runner.run(stages[name]) for name in names]
    return int(not all(results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
