"""What the studies share: their options, the runs they start, and the files they write."""

import argparse
import concurrent.futures
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import timm
import torch

ROOT = Path(__file__).parents[1]
RECIPE = "studies/fashion.json"
# of Fashion-MNIST's images
IMAGES = ["--img-size", "28", "--mean", "0.286", "--std", "0.353"]
# smaller than deit_nano_fashion, whose heads are twice as wide
DEIT = {"patch_size": 4, "in_chans": 1, "embed_dim": 64, "depth": 4, "num_heads": 2}
DEIT_ARGS = [f"{name}={value}" for name, value in DEIT.items()] + ["weight_init=jax"]
RESNET_ARGS = ["in_chans=1", "channels=[32,64,128,256]", "layers=[2,2,1,1]"]
# how a run is read and evaluated
COMMON = ["--recipe", RECIPE, "--workers", "0"]
AT_THE_END = ["--eval-every", "100"]


def parser_of(description: str, docs: Path) -> argparse.ArgumentParser:
    """Options of every study; `docs` is where its page goes."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--docs", type=Path, default=docs)
    parser.add_argument("--quick", action="store_true", help="a smoke run, for minutes")
    return parser


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Options of the studies that train."""
    parser.add_argument("--work", required=True, type=Path, help="folder of the runs")
    parser.add_argument("--parallel", type=int, default=1)


def run_all(
    commands: Iterable[tuple[str, list[str], str | None]], work: Path, parallel: int
) -> None:
    """Run commands, so many at a time.

    commands: (name, command, the name of the command it needs). A complete training run in the
    folder of that name is not run again.
    """
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        started: dict[str, concurrent.futures.Future] = {}
        for name, command, needs in commands:
            first = None if needs is None else started[needs]
            done = work / name if command[1] == "train" else None
            started[name] = pool.submit(run, command, done, first)
        try:
            for training in started.values():
                training.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def run(
    command: list[str],
    out: Path | None = None,
    first: concurrent.futures.Future | None = None,
    cwd: Path = ROOT,
) -> None:
    """In a process with one thread, after `first`; what is complete is not run again."""
    if first is not None:
        first.result()
    if out is not None and (out / "result.json").exists():
        return
    module = [sys.executable, "-m", "deit_fast", *command[1:]]
    environment = one_thread()
    ended = subprocess.run(module, env=environment, cwd=cwd, stderr=subprocess.PIPE)
    if ended.returncode:
        sys.exit(f"{shlex.join(command)}: {ended.returncode}\n{ended.stderr.decode()}")


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def write_study(docs: Path, name: str, study: dict, page: Callable[[dict], str]) -> None:
    """NAME.json, and the page that is made of it, which is printed too."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / f"{name}.json").write_text(json.dumps(study, indent=1) + "\n")
    (docs / f"{name}.md").write_text(page(study))
    print(page(study))


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
    }  # fmt: skip


def spread(values: list[float]) -> str:
    """Mean and the sample's standard deviation."""
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def each_value(values: list[float]) -> str:
    return ", ".join(f"{value:.2f}" for value in values)
