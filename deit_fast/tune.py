"""Measure on this GPU which implementation and tiles serve each operation of a model best.

examples:
  python -m deit_fast.tune --model deit_base_distilled
  python -m deit_fast.tune --model deit_tiny deit_small --batch 64 256 --dtype fp16 --minutes 10
  python -m deit_fast.tune --model deit_base_distilled --format fp8

The winners go to a table in the user's cache directory ($DEIT_FAST_CACHE, $XDG_CACHE_HOME/deit_fast
or ~/.cache/deit_fast), from where every process that uses this GPU takes them. Choices for other
shapes stay in the table; the shapes that it has are not measured again without --again. Each
candidate has to agree with PyTorch before it is timed. When the minutes are over, or with Ctrl-C,
what was settled until then is written, and the same call goes on from there.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median

import torch
import triton
from torch.utils._pytree import tree_leaves
from triton.errors import TritonError

from deit_fast.bench import timing
from deit_fast.bench.launches import record
from deit_fast.bench.networks import device_is_lost
from deit_fast.kernels import (
    Quantized,
    _chips,
    _tuned,
    attention_reference,
    dequantize,
    layer_norm_linear_reference,
    layer_norm_mlp_reference,
    linear_reference,
    quantize_reference,
    quantized_linear_reference,
)
from deit_fast.kernels import attention as run_attention
from deit_fast.kernels import layer_norm_linear as run_layer_norm_linear
from deit_fast.kernels import layer_norm_mlp as run_layer_norm_mlp
from deit_fast.kernels import linear as run_linear
from deit_fast.kernels import quantized_linear as run_quantized_linear
from deit_fast.kernels.attention import configs as attention
from deit_fast.kernels.layer_norm_mlp import configs as layer_norm_mlp
from deit_fast.kernels.linear import configs as linear
from deit_fast.kernels.linear import linear_gelu_backward
from deit_fast.kernels.quantize import FORMATS, quantize_statically_reference
from deit_fast.kernels.quantized_linear import SHORT_SUMS
from deit_fast.kernels.quantized_linear import configs as quantized_linear
from deit_fast.models import create_model
from deit_fast.quantization import quantize

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ORDER = ("linear", "attention", "layer_norm_linear", "layer_norm_mlp", "quantized_linear")
SCALE = 0.02  # of e4m3 where one serves for all: 9 at most
RUNS, WARMUP = 20, 3


@dataclass(frozen=True)
class Task:
    """One operation on one shape, and what may serve it. Equal where the table calls it the
    same."""

    op: str
    shape: tuple  # as `_tuned.lookup` is asked, in items
    candidates: tuple = field(compare=False)  # of choices, in items
    make: Callable[[torch.device], dict] = field(compare=False)
    call: Callable[..., object] = field(compare=False)
    reference: Callable[..., object] = field(compare=False)
    # the reference without the rounding of its result, where inputs in fp32 do not do that
    exact: Callable[..., object] | None = field(compare=False, default=None)

    def __str__(self):
        return f"{self.op} {', '.join(f'{k} {v}' for k, v in self.shape)}"


@dataclass
class Settled:
    """A row of the table: the winner, its time in ms, and everyone's; None: it failed."""

    op: str
    shape: dict
    choice: dict
    ms: float
    others: dict


def tasks(
    model: torch.nn.Module, batch: int, dtype: torch.dtype, chip, training: bool = False
) -> list[Task]:  # fmt: skip
    """What a forward pass of `model` (moved to the meta device) asks, each once. What is made of
    products comes behind them, and is compared with the best of them. training: also the one
    product of the backward pass that may be Triton's."""
    recorder = record(model, batch, dtype, chip, tables=False)
    found: dict[Task, None] = {}
    # the last first: of the calls of one shape only the model's first lacks its row statistics
    for name, args, _ in reversed(recorder.calls):
        if name in _TASKS:
            for task in _TASKS[name](args, chip):
                found.setdefault(task)
    found |= dict.fromkeys(_mlps(recorder.calls, chip))
    if training:
        found |= dict.fromkeys(_gelu_backwards(recorder.calls, chip))
    return ordered(found)


def ordered(wanted) -> list[Task]:
    return sorted(wanted, key=lambda task: ORDER.index(task.op))


def _randn(like: torch.Tensor | None, device, scale=1.0):
    if like is None:
        return None
    return (scale * torch.randn(like.shape, device=device)).to(like.dtype)


def _row_stats(x, parts):
    """What a product leaves beside x."""
    parts = x.float().view(len(x), parts, -1)
    mean = parts.mean(2)
    squares = (parts - mean[..., None]).square().sum(2)
    return torch.stack([mean.t(), squares.t()], 1).contiguous()


def _linear_candidates(dtype, chip, cublas, narrow=True, backward=False):
    triton_choices = [
        {"implementation": "triton", **config}
        for config in linear.configs(dtype, chip.capability, backward)
        if narrow or config["BLOCK_N"] >= linear.ROW_STATS_WIDTH
    ]
    return _items([{"implementation": "cublas"}] * cublas + triton_choices)


def _items(choices):
    return tuple(tuple(choice.items()) for choice in choices)


def _linear_task(args, chip):
    x, weight, bias, residual, layer_scale, row_scale, activation, emit, *_ = args
    (M, K), N = x.shape, weight.shape[0]
    scaled = layer_scale is not None or row_scale is not None
    epilogue = linear.epilogue_name(
        activation, bias is not None, residual is not None, scaled, False, emit
    )
    shape = {"M": M, "K": K, "N": N, "dtype": str(x.dtype)[6:], "epilogue": epilogue}

    def make(device):
        return {
            "x": _randn(x, device), "weight": _randn(weight, device, K**-0.5),
            "bias": _randn(bias, device), "activation": activation,
            "residual": _randn(residual, device), "layer_scale": _randn(layer_scale, device),
            "row_scale": _randn(row_scale, device),
        }  # fmt: skip

    def call(**inputs):
        return run_linear(**inputs, return_row_stats=emit)

    yield Task(
        "linear", tuple(shape.items()), _linear_candidates(x.dtype, chip, True, not emit), make,
        call, linear_reference,
    )  # fmt: skip


def _layer_norm_linear_tasks(args, chip):
    """The product with the LayerNorm folded into it; then whether to fold at all."""
    x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation = args
    (M, K), N = x.shape, weight.shape[0]
    dtype = str(x.dtype)[6:]
    epilogue = linear.epilogue_name(activation, True, False, False, True, False)

    def make(device):
        made = {
            "x": _randn(x, device), "norm_weight": _randn(norm_weight, device),
            "norm_bias": _randn(norm_bias, device), "weight": _randn(weight, device, K**-0.5),
            "bias": _randn(bias, device), "eps": eps, "activation": activation,
        }  # fmt: skip
        if row_stats is not None:
            made["row_stats"] = _row_stats(made["x"], row_stats.shape[0])
        return made

    def reference(row_stats=None, **inputs):
        return layer_norm_linear_reference(**inputs)

    def folded(**inputs):
        return run_layer_norm_linear(**inputs, implementation="fold")

    product = {"M": M, "K": K, "N": N, "dtype": dtype, "epilogue": epilogue}
    yield Task(
        "linear", tuple(product.items()), _linear_candidates(x.dtype, chip, False), make, folded,
        reference,
    )  # fmt: skip
    separate = product | {
        "epilogue": linear.epilogue_name(activation, bias is not None, False, False, False, False)
    }

    def plain(x, weight, bias, activation, **_):
        return run_linear(x, weight, bias, activation)

    def plain_reference(x, weight, bias, activation, **_):
        return linear_reference(x, weight, bias, activation)

    yield Task(
        "linear", tuple(separate.items()), _linear_candidates(x.dtype, chip, True), make, plain,
        plain_reference,
    )  # fmt: skip
    shape = {"M": M, "K": K, "N": N, "dtype": dtype}
    both = _items([{"implementation": "fold"}, {"implementation": "separate"}])
    yield Task(
        "layer_norm_linear", tuple(shape.items()), both, make, run_layer_norm_linear, reference
    )


def _attention_task(args, chip):
    q, k, v, bias, scale, *_ = args
    B, N, H, d = q.shape
    L = k.shape[1]
    shape = {
        "M": B * H, "N": N, "L": L, "d": d, "dtype": str(q.dtype)[6:], "bias": bias is not None,
    }  # fmt: skip

    def make(device):
        packed = torch.randn(B, L, 3, H, d, device=device).to(q.dtype)
        queries, keys, values = packed.unbind(2)
        return {
            "q": queries[:, :N], "k": keys, "v": values, "scale": scale,
            "bias": _randn(bias, device),
        }  # fmt: skip

    choices = [
        {"implementation": "triton", **config}
        for config in attention.configs(q.dtype, N, L, d, bias is not None)
    ]
    yield Task(
        "attention", tuple(shape.items()), _items([{"implementation": "torch"}, *choices]), make,
        run_attention, attention_reference,
    )  # fmt: skip


def _quantized_attention_task(args, chip):
    """The table is attention's: the result's rounding changes little."""
    q, k, v, scale, *_ = args
    if q.element_size() == 1:  # of which there is one configuration
        return
    yield from _attention_task((q, k, v, None, scale), chip)


def _quantized_linear_task(args, chip):
    (
        x, x_scales, weight, _, bias, residual, layer_scale, row_scale, out_scale, activation, dtype
    ) = args  # fmt: skip
    shape = quantized_linear.lookup_shape(*args)
    format, one_scale = shape["dtype"], x_scales.numel() == 1

    def make(device):
        rows = torch.randn(x.shape, device=device)
        scale = torch.full((1, 1), SCALE, device=device)
        columns = torch.randn(weight.shape, device=device) * weight.shape[1] ** -0.5
        made = {
            "x": quantize_statically_reference(rows, scale) if one_scale and format == "fp8"
            else quantize_reference(rows, format, len(x_scales)),
            "weight": quantize_reference(columns, format), "bias": _randn(bias, device),
            "activation": activation, "residual": _randn(residual, device),
            "layer_scale": _randn(layer_scale, device), "row_scale": _randn(row_scale, device),
        }  # fmt: skip
        if dtype.itemsize > 1:
            return made | {"dtype": dtype}
        return made | {"format": format, "out_scale": None if out_scale is None else scale}

    def exact(dtype=None, format=None, out_scale=None, **inputs):
        return quantized_linear_reference(**inputs, dtype=torch.float32)

    choices = [{"implementation": "triton", **c} for c in quantized_linear.configs(chip.capability)]
    choices = [c for c in choices if not quantized_linear.why_not(shape, c, chip.capability)]
    yield Task(
        "quantized_linear", tuple(shape.items()), _items(choices), make, run_quantized_linear,
        quantized_linear_reference, exact,
    )  # fmt: skip


def served_by(op: str, inputs: dict) -> str:
    """The implementation that "auto" takes for `linear` or `attention`, by table or rule."""
    if op == "attention":
        bias = inputs.get("bias") is not None
        return attention.choose(inputs["q"], inputs["k"].shape[1], bias, "auto")[0]
    x, weight = inputs["x"], inputs["weight"]
    bias, residual, layer_scale, row_scale = (
        inputs.get(name) is not None for name in ("bias", "residual", "layer_scale", "row_scale")
    )
    epilogue = linear.epilogue_name(
        inputs["activation"], bias, residual, layer_scale or row_scale, False, False
    )
    return linear.choose(x.flatten(0, -2), weight.shape[0], epilogue, False, "auto")[0]


def _gelu_backwards(calls, chip):
    """The product that brings fc2's gradient behind GELU."""
    for (name, fc1, made), (after, fc2, _) in zip(calls, calls[1:], strict=False):
        if name not in ("linear", "layer_norm_linear") or after != "linear":
            continue
        if "gelu" not in [argument for argument in fc1 if isinstance(argument, str)]:
            continue
        hidden, weight = made[0] if name == "linear" else made, fc2[1]
        if fc2[0].shape != hidden.shape:
            continue
        x, (M, N), K = fc1[0], hidden.shape, weight.shape[0]
        shape = {
            "M": M, "K": K, "N": N, "dtype": str(hidden.dtype)[6:], "epilogue": "gelu_backward",
        }  # fmt: skip

        def make(device, dy=x, weight=weight, z=hidden):  # dy is as fc1's x
            return {
                "dy": _randn(dy, device), "weight": _randn(weight, device, len(weight) ** -0.5),
                "z": _randn(z, device),
            }  # fmt: skip

        def call(dy, weight, z):
            return linear_gelu_backward(dy, weight, z, "auto")[0]

        def reference(dy, weight, z):
            return torch.ops.aten.gelu_backward(dy @ weight, z)

        candidates = _linear_candidates(hidden.dtype, chip, True, backward=True)
        yield Task("linear", tuple(shape.items()), candidates, make, call, reference)


def _mlps(calls, chip):
    """fc1 and the fc2 behind it, where one kernel can do both."""
    for (name, args, hidden), (after, rest, _) in zip(calls, calls[1:], strict=False):
        if (name, after) != ("layer_norm_linear", "linear") or rest[0].shape != hidden.shape:
            continue
        x, norm_weight, norm_bias, weight, bias, row_stats, eps, activation = args
        _, weight2, bias2, residual, layer_scale, row_scale, _, emit, *_ = rest
        D = x.shape[1]
        scaled = layer_scale is not None or row_scale is not None
        fits = D in layer_norm_mlp.FUSED_D and weight2.shape[0] == D and weight.shape[0] % 32 == 0
        if activation != "gelu" or scaled or not fits:
            continue
        yield _mlp_task(
            x, (norm_weight, norm_bias, weight, bias, weight2, bias2), residual, row_stats, eps, emit,
            chip,
        )  # fmt: skip


def _mlp_task(x, weights, residual, row_stats, eps, emit, chip):
    hidden, D = weights[2].shape
    shape = {"M": x.shape[0], "D": D, "hidden": hidden, "dtype": str(x.dtype)[6:]}
    names = ("norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")

    def make(device):
        made = {
            name: _randn(t, device, 1.0 if t is None or t.dim() == 1 else t.shape[1] ** -0.5)
            for name, t in zip(names, weights, strict=True)
        }
        made["x"] = _randn(x, device)
        if row_stats is not None:
            made["row_stats"] = _row_stats(made["x"], row_stats.shape[0])
        return made | {"residual": _randn(residual, device), "eps": eps}

    def call(**inputs):
        return run_layer_norm_mlp(**inputs, return_row_stats=emit)

    def reference(row_stats=None, **inputs):
        return layer_norm_mlp_reference(**inputs)

    choices = [{"implementation": "fused", **c} for c in layer_norm_mlp.configs(chip.capability)]
    return Task(
        "layer_norm_mlp", tuple(shape.items()), _items([{"implementation": "parts"}, *choices]),
        make, call, reference,
    )  # fmt: skip


_TASKS = {
    "linear": _linear_task, "layer_norm_linear": _layer_norm_linear_tasks,
    "attention": _attention_task, "attention_quantized": _quantized_attention_task,
    "quantized_linear": _quantized_linear_task,
}  # fmt: skip


def settle(
    wanted: list[Task], device: torch.device, clock: Callable, deadline: float,
    tick: Callable = lambda task, times: None, known: Iterable[dict] = (),
) -> Iterator[Settled]:  # fmt: skip
    """Race the candidates of each task, until `time.monotonic()` passes `deadline`. clock(call,
    inputs) gives the milliseconds of call(x) for x in turn; tick(task, times) hears of each race.
    What was settled before serves the tasks that follow, as do `known` rows of a table."""
    known = list(known)
    for task in wanted:
        if time.monotonic() >= deadline:
            return
        times = _race(task, device, clock, known)
        tick(task, times)
        if not any(times.values()):
            continue
        winner = min((c for c in times if times[c]), key=times.get)
        row = Settled(
            task.op, dict(task.shape), dict(winner), times[winner],
            {_name(c): ms for c, ms in times.items() if c != winner},
        )  # fmt: skip
        known.append(asdict(row))
        yield row


def _race(task, device, clock, known):
    """{choice: milliseconds, or None where it failed or disagreed}; nothing where the device's
    memory does not hold the task."""
    times, chip = {}, _chips.chip(device)
    with torch.no_grad(), _tuned.disabled(), _tuned.assumed(known, chip):
        try:
            inputs = task.make(device)
            exact = (task.exact or task.reference)(**{k: _wide(v) for k, v in inputs.items()})
            plain = _error(task.reference(**inputs), exact)
            nbytes = sum(t.nbytes for t in tree_leaves(inputs) if isinstance(t, torch.Tensor))
            others = timing.rotation(lambda: task.make(device), nbytes, device)[1:]
        except torch.OutOfMemoryError:
            return {}
        for candidate in task.candidates:
            times[candidate] = None
            with _tuned.forced(task.op, dict(candidate)):
                try:
                    if _agrees(task.call(**inputs), exact, 2 * plain + allowance(inputs)):
                        times[candidate] = clock(lambda x: task.call(**x), [inputs, *others])
                except (RuntimeError, TritonError) as error:  # beyond this chip's resources
                    if device_is_lost(error):
                        raise
    return times


def allowance(inputs: dict) -> float:
    """What a result may err beyond twice its reference's relative error."""
    tensors = [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]
    short = any(t.is_cuda and t.dtype == torch.float8_e4m3fn for t in tensors)
    return SHORT_SUMS if short else 1e-6


def _agrees(got, exact, allowed):
    """Whether the result errs no more than allowed, and the row statistics, if any, are its own."""
    y, row_stats = got if type(got) is tuple else (got, None)
    if not _error(y, exact) <= allowed:  # NaN too
        return False
    return row_stats is None or _error(row_stats, _row_stats(y, len(row_stats))) < 1e-4


def _wide(value):
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return value.float() if floating else value


def _error(got, exact):
    got = dequantize(got) if isinstance(got, Quantized) else got
    return ((got.double() - exact.double()).norm() / exact.double().norm()).item()


def _name(choice):
    return ", ".join(f"{k} {v}" if k != "implementation" else v for k, v in choice)


def kept(path: Path, chip) -> list[dict]:
    """The rows of the table at `path`, if there is one. Raises ValueError, naming it, where it is
    not this chip's or not one."""
    if not path.exists():
        return []
    try:
        _tuned.read(path, chip)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; delete it, or pass --out for another") from None
    return json.loads(path.read_text())["choices"]


def write(path: Path, rows: list[Settled], chip) -> int:
    """Merge `rows` into the table at `path`; returns how many choices it then has. Raises
    ValueError where a table is there that can't be merged into: it is left as it is."""
    before = kept(path, chip)
    new = [asdict(row) for row in rows]
    keys = [(row["op"], row["shape"]) for row in new]
    choices = [row for row in before if (row["op"], row["shape"]) not in keys] + new
    table = {
        "gpu": chip.name, "capability": list(chip.capability), "torch": torch.__version__,
        "triton": triton.__version__, "date": date.today().isoformat(), "choices": choices,
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(path)
    return len(choices)


def add_arguments(parser):
    parser.add_argument("--model", nargs="+", required=True, help="ours or timm's names")
    parser.add_argument("--batch", nargs="+", type=int, default=[256], help="(default: 256)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="(default: %(default)s)")
    parser.add_argument("--format", choices=FORMATS, help="of quantised models (default: none)")
    parser.add_argument("--training", action="store_true", help="also what a training step asks")
    parser.add_argument("--image-size", type=int, metavar="PX", help="(default: the model's own)")
    parser.add_argument(
        "--minutes", type=float, default=5.0, help="after which nothing is begun (default: 5)"
    )
    parser.add_argument("--again", action="store_true", help="also what the table has already")
    parser.add_argument("--out", type=Path, metavar="PATH", help="another table than the cache's")


def run(args, clock: Callable | None = None) -> int:
    if min(args.batch) < 1:
        raise ValueError(f"--batch: {min(args.batch)}, expected 1 or more")
    if not args.minutes > 0:
        raise ValueError(f"--minutes: {args.minutes}, expected more than 0")
    if not torch.cuda.is_available() and clock is None:
        raise RuntimeError("tuning measures on a CUDA device, and this machine has none")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chip = _chips.chip(device)
    if chip.capability < (8, 0):
        print(f"{chip.name}: cuBLAS and PyTorch serve its products, there is nothing to choose")
        return 0
    path = args.out or _tuned.folder() / f"{_tuned.slug(chip.name)}.json"
    before = kept(path, chip)  # before minutes are spent
    options = {} if args.image_size is None else {"img_size": args.image_size}
    wanted: dict[Task, None] = {}
    for name in args.model:
        for batch in args.batch:
            with torch.device("meta"), _chips.simulate_device(chip):
                model = create_model(name, **options)
                if args.format is not None:
                    quantize(model, args.format)
            dtype = DTYPES[args.dtype]
            wanted |= dict.fromkeys(tasks(model, batch, dtype, chip, args.training))
    there = [] if args.again else [(row["op"], row["shape"]) for row in before]
    todo = [task for task in ordered(wanted) if (task.op, dict(task.shape)) not in there]
    if not todo:
        print(f"{path}: has all {len(wanted)} choices already; --again measures them anew")
        return 0
    known = [] if args.again else before
    if clock is None:

        def clock(call, inputs):
            return median(timing.kernel_ms(call, inputs, RUNS, WARMUP, device))

    settled: list[Settled] = []
    unserved: list[str] = []
    stopped = False
    with _progress(len(todo)) as advance:

        def tick(task, times):
            advance(str(task))
            if not any(times.values()):
                full = task.candidates and not times
                why = "more than the device's memory" if full else "no candidate ran and agreed"
                unserved.append(f"{task}: {why}")

        deadline = time.monotonic() + 60 * args.minutes
        try:
            for row in settle(todo, device, clock, deadline, tick, known):
                settled.append(row)
        except KeyboardInterrupt:
            stopped = True
        finally:  # a lost device does not lose what was settled
            total = write(path, settled, chip) if settled else 0
    for line in unserved:
        print(line, file=sys.stderr)
    if not settled:
        print("nothing was settled: no table written", file=sys.stderr)
        return 130 if stopped else 1
    _tuned.forget()
    left = len(todo) - len(settled)
    more = f", {left} left" if left else ""
    print(f"{path}: {len(settled)} choices measured, {total} in all{more}")
    return 130 if stopped else 0


@contextmanager
def _progress(total):
    """A bar on stderr: a function to be told what was done. Without rich, a line for each."""
    try:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )
    except ImportError:
        yield lambda text: print(text, file=sys.stderr)
        return
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("tuning", total=total)
        yield lambda text: progress.update(bar, advance=1, description=text)


def main(argv: list[str] | None = None) -> int:
    summary, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m deit_fast.tune", description=summary, epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_arguments(parser)
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"deit_fast.tune: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
