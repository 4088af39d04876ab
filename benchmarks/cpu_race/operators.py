"""Where the time of a contender goes, operator by operator: PyTorch's profiler, or OpenVINO's own.

python -m benchmarks.cpu_race.operators --models small --batch 8

Times are of the calling thread, self time, the mean of some calls; a profiler makes small
operators look slower than they are. ONNX Runtime is left out: its profile names fused nodes of the
exported graph that no other contender has.
"""

import argparse
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from .contenders import CONTENDERS, NETWORKS, SMOKE, compile_openvino, model_of

PROFILED = ("eager", "compile-freezing", "openvino", "ours", "ours-engine")
CALLS = 5
SHOWN = 8  # operators of a contender, the rest in one line
Times = dict[str, tuple[float, float]]  # of an operator: calls, and ms, in one forward pass


def of_pytorch(contender: str, timm_name: str, images: np.ndarray, threads: int) -> Times:
    """Self CPU time by operator of one of the contenders that run in PyTorch."""
    call = CONTENDERS[contender][1](model_of(timm_name), images, threads)
    for _ in range(3):
        call(images)
    with profile(activities=[ProfilerActivity.CPU]) as made:
        for _ in range(CALLS):
            call(images)
    return {
        # the code that Inductor generated has a hash for a name
        "generated code" if "CompiledFxGraph" in event.key else event.key:
        (event.count / CALLS, event.self_cpu_time_total / 1e3 / CALLS)
        for event in made.key_averages()
    }  # fmt: skip


def of_openvino(timm_name: str, images: np.ndarray, threads: int) -> Times:
    """Time by kind of node; the implementation's name with it."""
    model = compile_openvino(model_of(timm_name), images, threads, PERF_COUNT="YES")
    request, found = model.create_infer_request(), defaultdict(lambda: (0.0, 0.0))
    for _ in range(3):
        request.infer({0: images})
    for _ in range(CALLS):
        request.infer({0: images})
        for node in request.profiling_info:
            if node.status == node.Status.EXECUTED:
                calls, ms = found[name := f"{node.node_type} ({node.exec_type})"]
                took = 1e3 * node.real_time.total_seconds()
                found[name] = calls + 1 / CALLS, ms + took / CALLS
    return dict(found)


def table(name: str, times: Times) -> Iterator[str]:
    """The lines of a contender, in Markdown: the longest operators, the rest, the sum."""
    longest = sorted(times.items(), key=lambda item: -item[1][1])
    shown, rest = longest[:SHOWN], longest[SHOWN:]
    for operator, (calls, ms) in shown:
        yield f"| {name} | {operator} | {calls:.0f} | {ms:.2f} |"
    if rest:
        calls, ms = (sum(figures) for figures in zip(*(f for _, f in rest), strict=True))
        yield f"| {name} | {len(rest)} others | {calls:.0f} | {ms:.2f} |"
    yield f"| {name} | **sum** | | **{sum(ms for _, ms in times.values()):.1f}** |"


def parser() -> argparse.ArgumentParser:
    """Of the command's options."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_race.operators", description=__doc__.splitlines()[0]
    )
    made.add_argument("--models", nargs="+", choices=(*NETWORKS, "smoke"), default=["small"],
                      metavar="NAME", help=f"{', '.join(NETWORKS)} (default: small)")  # fmt: skip
    made.add_argument("--batch", type=int, default=8, help="(default: %(default)s)")
    made.add_argument("--contenders", nargs="+", choices=PROFILED, default=list(PROFILED),
                      metavar="NAME", help=f"{', '.join(PROFILED)}; default: all")  # fmt: skip
    made.add_argument("--threads", type=int, default=torch.get_num_threads(),
                      help="(default: %(default)s)")  # fmt: skip
    return made


def main(argv: list[str] | None = None) -> None:
    """Print a table for each network."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    for model in args.models:
        network, timm_name = SMOKE if model == "smoke" else NETWORKS[model]
        size = model_of(timm_name).patch_embed.img_size
        images = np.random.default_rng(1).standard_normal((args.batch, 3, *size), dtype=np.float32)
        print(f"{network}, batch {args.batch}, {args.threads} threads\n")
        print("| | operator | calls | ms |\n|---|---|---:|---:|")
        for contender in args.contenders:
            if contender == "openvino":
                times = of_openvino(timm_name, images, args.threads)
            else:
                times = of_pytorch(contender, timm_name, images, args.threads)
            for line in table(CONTENDERS[contender][0], times):
                print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
