"""The stages and their commands. Data only: on a GPU everything, on a CPU a smoke run."""

from collections.abc import Callable
from dataclasses import dataclass, field

TUNED_MODELS = ("deit_base_distilled", "deit_base_distilled_384", "deit_small_distilled")


@dataclass(frozen=True)
class Command:
    """One call of Python.

    Attributes:
        arguments: Of the interpreter; of a benchmark, the files and options of pytest.
        benchmark: Whether it is a run of `pytest --benchmark-only`, which gets the result folder,
            the minutes left and on a CPU the smallest sizes.
        log: File in the result folder that gets a copy of the output.
        append: Whether the log goes on from the command before.
        tool: Command line in front of the interpreter's.
        environment: Variables for this command alone.
    """

    arguments: tuple[str, ...]
    benchmark: bool = False
    log: str | None = None
    append: bool = False
    tool: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Scope:
    """Networks and modes of the benchmarks."""

    gpu: bool
    deits: tuple[str, ...]
    vits: str
    convnets: str
    quantized: tuple[str, ...]
    relatives: tuple[str, ...]  # options that choose some of them
    forward: tuple[str, ...]  # PyTorch's eager modes
    fast: tuple[str, ...]  # ours
    compiled: tuple[str, ...]  # torch.compile's, the default mode first
    relative_modes: tuple[str, ...]
    latency_modes: tuple[str, ...]
    host_modes: tuple[str, ...]
    quantized_modes: tuple[tuple[str, ...], ...]  # those with targets first
    train_modes: tuple[tuple[str, ...], ...]  # those with targets first


FULL = Scope(
    gpu=True,
    deits=("DeiT-Ti distilled", "DeiT-S distilled", "DeiT-B distilled"),
    vits="transformer",
    convnets="convnet",
    quantized=("DeiT-B distilled", "DeiT-B-384 distilled", "DeiT-S distilled"),
    relatives=(),
    forward=("eager_fp32", "eager_tf32", "eager_amp_fp16", "eager_fp16", "eager_bf16"),
    fast=("deit_fast_fp32", "deit_fast_fp16", "deit_fast_bf16", "deit_fast_engine_bf16"),
    compiled=("compile_bf16", "compile_max_autotune_bf16"),
    relative_modes=(
        "eager_bf16", "deit_fast_bf16", "deit_fast_engine_bf16", "compile_reduce_overhead_bf16",
        "compile_bf16", "eager_fp32",
    ),
    latency_modes=(
        "eager_bf16", "deit_fast_bf16", "deit_fast_engine_bf16", "compile_reduce_overhead_bf16",
        "compile_bf16", "compile_max_autotune_bf16",
    ),
    host_modes=("eager_bf16", "deit_fast_bf16", "deit_fast_engine_bf16"),
    quantized_modes=(
        (
            "deit_fast_bf16", "deit_fast_fp8", "deit_fast_engine_bf16", "deit_fast_engine_fp8",
            "torchao_fp8_compile",
        ),
        ("deit_fast_int8", "deit_fast_fp8_attention", "eager_bf16"),
    ),
    train_modes=(
        (
            "deit_fast_reduce_overhead_amp_bf16_train", "compile_max_autotune_amp_bf16_train",
            "deit_fast_amp_bf16_train", "eager_amp_bf16_train", "compile_amp_bf16_train",
        ),
        (
            "eager_fp32_train", "eager_amp_fp16_train", "eager_bf16_train", "deit_fast_bf16_train",
            "compile_bf16_train", "compile_max_autotune_bf16_train",
        ),
    ),
)  # fmt: skip
SMOKE = Scope(
    gpu=False,
    deits=("DeiT-Ti distilled",),
    vits="DeiT-Ti distilled",
    convnets="ResNet-18",
    quantized=("DeiT-Ti distilled",),
    relatives=("--rows", "TinyViT-5M"),
    forward=("eager_fp32",),
    fast=("deit_fast_fp32",),
    compiled=("compile_bf16",),
    relative_modes=("eager_fp32", "deit_fast_fp32"),
    latency_modes=("eager_fp32", "deit_fast_fp32", "compile_bf16"),
    host_modes=("deit_fast_fp32",),
    quantized_modes=(("deit_fast_fp8", "torchao_fp8_compile", "deit_fast_int8"),),
    train_modes=(("eager_fp32_train", "deit_fast_fp32_train"),),
)
SMOKE_OPTIONS = ("--max-batch", "1", "--runs", "2", "--warmup", "1")  # after a benchmark's own

KERNELS = (
    "layer_norm", "linear", "layer_norm_linear", "attention", "layer_norm_attention",
    "patch_embed", "layer_norm_mlp", "classifier", "distillation_loss", "sparse_cross_entropy",
    "talking_heads", "window_attention", "conv_norm",
)  # fmt: skip
QUANTIZED_KERNELS = ("attention_quantized", "layer_norm_quantized", "quantize", "quantized_linear")
# What no CPU can show; everything else is CI's
GPU_TESTS = (
    "tests/kernels", "tests/layers", "tests/checkpoint", "tests/cli",
    "tests/distill/test_training.py", "tests/distill/test_training_loops.py",
    "tests/test_engine.py", "tests/test_images.py", "tests/test_batch_inference.py",
    "tests/pretrained", "tests/test_export.py",
    "tests/test_quantization.py", "tests/test_quantization_report.py",
)  # fmt: skip
BENCH_TESTS = ("tests/bench",)
# Tests of the kernels under compute-sanitizer: in fp16; the quantized ones by name alone, as those
# have no dtype, or one of several
SANITIZED = (
    "no_less_accurate", "every_configuration", "test_layer_norm", "test_add_layer_norm",
    "test_two_heads",
)  # fmt: skip
SANITIZED_QUANTIZED = (
    "test_round_trip and float16", "test_quantized_result", "test_per_tensor_scales_of_x",
    "test_quantized_in_every", "test_fp8_operands", "test_what_the_rule_takes",
)  # fmt: skip


def _benchmark(*arguments):
    return Command(arguments, benchmark=True)


def _files(names):
    return [f"benchmarks/bench_{name}.py" for name in names]


def _table5(rows, protocol, modes, *options):
    return _benchmark(
        "benchmarks/bench_table5.py", "--rows", rows, "--protocols", protocol, *options,
        "--modes", ",".join(modes),
    )  # fmt: skip


def _kernels(scope, names, direction):
    return _benchmark(
        *_files(names), "--rows", ",".join((*scope.deits, "DeiT-B-384 distilled")),
        "--against-playbook", "-k", direction,
    )  # fmt: skip


def _tune(model, *options):
    return Command(("-m", "deit_fast.tune", "--model", model, *options))


def correctness(scope: Scope) -> list[Command]:
    """The tests that need a GPU."""
    tests = ("-m", "pytest", "-q", "-n", "8", "-m", "gpu or device and not slow", *GPU_TESTS)
    bench = ("-m", "pytest", "-q", "-m", "gpu", *BENCH_TESTS)
    log = "correctness.log"
    return [Command(tests, log=log), Command(bench, log=log, append=True)]


def sanitize(scope: Scope) -> list[Command]:
    """The kernels' tests under memcheck, then initcheck.

    Real allocations, so that the tool sees the true bounds.
    """
    chosen = f"({' or '.join(SANITIZED)}) and float16 or {' or '.join(SANITIZED_QUANTIZED)}"
    return [
        Command(
            ("-m", "pytest", "-q", "-x", "tests/kernels", "-k", chosen),
            log=f"sanitize-{tool}.log",
            tool=(
                "compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20",
            ),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
        for tool in ("memcheck", "initcheck")
    ]  # fmt: skip


def peak_rates(scope: Scope) -> list[Command]:
    """Measured anew."""
    return [_benchmark("benchmarks/bench_peak_rates.py", "--again")]


def tune(scope: Scope) -> list[Command]:
    """What the minutes leave goes on in the next run of the stage."""
    return [_tune(model, "--minutes", "2") for model in (*TUNED_MODELS, "deit_tiny_distilled")]


def kernels(scope: Scope) -> list[Command]:
    """Forward, then with gradients."""
    return [_kernels(scope, KERNELS, direction) for direction in ("not backward", "backward")]


def table5_deit(scope: Scope) -> list[Command]:
    """Every forward mode at a given batch, then the paper's protocol."""
    return [
        _table5(scope.vits, "batch", (*scope.forward, *scope.fast, *scope.compiled)),
        _table5(
            ",".join(scope.deits), "paper", ("eager_fp32", *scope.fast), "--max-batch", "2048"
        ),
    ]  # fmt: skip


def table5_convnets(scope: Scope) -> list[Command]:
    """Without max-autotune: it takes minutes for each of the large ones."""
    groups = (("eager_fp32",), scope.forward, scope.compiled[:1])
    return [_table5(scope.convnets, "batch", modes) for modes in groups]


def relatives(scope: Scope) -> list[Command]:
    """The modes that matter most, then the compiled ones."""
    return [
        _benchmark(
            "benchmarks/bench_relatives.py", "--modes", ",".join(modes), *scope.relatives
        )
        for modes in (scope.relative_modes, scope.compiled)
    ]  # fmt: skip


def latency(scope: Scope) -> list[Command]:
    """Small batches on the device, then images from pinned host memory."""
    deits = ",".join(scope.deits)
    return [
        _benchmark(
            "benchmarks/bench_latency.py", "--rows", deits, "--modes", ",".join(scope.latency_modes)
        ),
        _table5(deits, "host", scope.host_modes),
    ]


def quantized(scope: Scope) -> list[Command]:
    """Tuning; the modes with targets, then the others; the quantized operations.

    A call for each network, because --rows are in the table's order.
    """
    tuning = [
        _tune(model, "--format", format, "--minutes", "0.5")
        for format in ("fp8", "int8")
        for model in TUNED_MODELS
    ]
    models = [
        _table5(network, "batch", modes)
        for modes in scope.quantized_modes
        for network in scope.quantized
    ]
    operations = _kernels(scope, QUANTIZED_KERNELS, "not backward")
    return [*(tuning if scope.gpu else ()), *models, operations]


def train(scope: Scope) -> list[Command]:
    """The modes with targets, then the others; ResNet-50 beside them."""
    file, deits = "benchmarks/bench_train.py", ",".join(scope.deits)
    commands = [
        _benchmark(file, "--rows", deits, "--modes", ",".join(modes)) for modes in scope.train_modes
    ]
    if scope.gpu:
        modes = ",".join(scope.train_modes[-1])
        commands.append(
            _benchmark(file, "--rows", "ResNet-50", "--batch", "256", "--modes", modes)
        )  # fmt: skip
    return commands


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: On the command line.
        title: One line for a reader.
        commands: Given a scope, what runs.
        without_gpu: Why nothing runs on a CPU; None where a smoke run does.
    """

    name: str
    title: str
    commands: Callable[[Scope], list[Command]]
    without_gpu: str | None = None


STAGES = (
    Stage("correctness", "the tests marked gpu: bf16 dots, real Triton code", correctness),
    Stage("sanitize", "out-of-bounds and misaligned accesses, uninitialised memory", sanitize,
          "compute-sanitizer has nothing to check without a GPU"),
    Stage("peak-rates", "copy bandwidth and the best GEMMs", peak_rates),
    Stage("tune", "which implementation and tiles serve DeiT's shapes best: a tuned table", tune,
          "made of measurements, there are none without a GPU"),
    Stage("kernels", "every operation but the quantized ones, predicted and measured", kernels),
    Stage("table5-deit", "DeiT and ViT in every forward mode, then by the paper's protocol",
          table5_deit),
    Stage("table5-convnets", "the convolutional networks, eager first, then compiled",
          table5_convnets),
    Stage("relatives", "ViT, DeiT-III, CaiT and TinyViT in the modes that matter most", relatives),
    Stage("latency", "batch 1, 8, 32; and 256 from pinned host memory", latency),
    Stage("quantized", "DeiT-S, B and B-384 in fp8 and int8 beside bf16 and torchao's fp8, and the "
          "quantized operations", quantized),
    Stage("train", "forward + backward, and the full step with AdamW, batch 64 and 256", train),
)  # fmt: skip
NAMES = tuple(stage.name for stage in STAGES)
