"""Whole networks: the modes that are compared run in turn, twice, in one process on one clock.

A row is written after the first round and again after the second, under the same key; the last one
counts. `speedup` is over the baseline of the same turns, so a run that is resumed measures that one
anew for every network of which something is missing.
"""

import math
from dataclasses import dataclass, field

import torch

from benchmarks.table5 import Entry, select
from deit_fast.bench import correctness, results, timing
from deit_fast.bench.device import last_sample
from deit_fast.bench.failures import device_is_lost, reason
from deit_fast.bench.modes import MODES, Mode
from deit_fast.bench.network import Network
from deit_fast.bench.step import Step

from .clocks import CLOCKS
from .context import Context

ROUNDS = 2
ROUND_SECONDS = 0.6  # of one mode's timed calls in one round
FEWEST, MOST, WARMUP = 5, 30, (5, 3)  # calls a round; before them, in the first and the second
BATCH, TRAIN_BATCH, SMALL_BATCH = 256, 256, 2
LATENCY_BATCHES = (1, 8, 32)
DEITS = ("DeiT-B distilled", "DeiT-S distilled", "DeiT-Ti distilled")
BASELINE, TRAIN_BASELINE = "eager_bf16", "eager_amp_bf16_train"
OURS, PLAIN = "deit_fast_engine_bf16", "deit_fast_bf16"


def deits(small: bool) -> list[str]:
    """The parts of the steps that are about DeiT: B, S, Ti."""
    return list(DEITS[-1:] if small else DEITS)


def larger(small: bool) -> list[str]:
    """The parts of the step "quantized": B and S."""
    return list(DEITS[-1:] if small else DEITS[:2])


def others(small: bool) -> list[str]:
    """The parts of the step "relatives"."""
    names = ["DeiT-B-384 distilled", "ViT-B/16 224", "CaiT-S24", "TinyViT-21M"]
    return ["TinyViT-5M"] if small else names


def throughput(ctx: Context, name: str) -> str:
    """The step "throughput": inference in bf16, and eager fp32."""
    return measure(ctx, name, (BASELINE, OURS, PLAIN, "eager_fp32"), BATCH)


def quantized(ctx: Context, name: str) -> str:
    """The step "quantized": fp8 and int8 beside bf16."""
    modes = (
        BASELINE, OURS, "deit_fast_engine_fp8", PLAIN, "deit_fast_fp8", "deit_fast_int8",
        "deit_fast_fp8_attention",
    )  # fmt: skip
    return measure(ctx, name, modes, BATCH)


def training(ctx: Context, name: str) -> str:
    """The step "training": forward and backward under autocast."""
    modes = (TRAIN_BASELINE, "deit_fast_graph_amp_bf16_train", "deit_fast_amp_bf16_train")
    return measure(ctx, name, modes, TRAIN_BATCH)


def latency(ctx: Context, name: str) -> str:
    """The step "latency": small batches, each call waited for."""
    said = [
        measure(ctx, name, (BASELINE, OURS, PLAIN), batch, "latency") for batch in LATENCY_BATCHES
    ]
    return "; ".join(filter(None, said))


def relatives(ctx: Context, name: str) -> str:
    """The step "relatives": inference in bf16."""
    return measure(ctx, name, (BASELINE, OURS, PLAIN), BATCH)


def entry_of(name: str) -> Entry:
    """The row of Table 5, or of its relatives, that has that name."""
    return next(e for e in select([name]) if e.network == name)


def network_of(name: str, device: torch.device, small: bool) -> Network:
    """The network, with few layers in a rehearsal."""
    entry = entry_of(name)
    options = {}
    if small:
        options = {"depths": (1, 1, 1, 1)} if "tiny_vit" in entry.timm_name else {"depth": 2}
    return Network(entry.timm_name, entry.image_size, device, entry.network, options)


@dataclass
class _Running:
    """One mode of a network, ready to be timed."""

    step: Step
    batch: int
    error: float
    peak_gb: float | None
    inputs: list
    runs: int
    times: list = field(default_factory=list)
    host_ms: float | None = None
    clock: dict = field(default_factory=dict)


_networks: dict[str, Network] = {}  # the last one: a step's parts share the process


def measure(
    ctx: Context, name: str, modes: tuple[str, ...], batch: int, protocol: str = "batch"
) -> str:  # fmt: skip
    """Time the modes of a network in turn.

    Rows that the folder has from this build are kept, except the baseline's where another is
    missing.

    Args:
        ctx: Of the step.
        name: The network, as Table 5 calls it.
        modes: Their names; the first is the baseline.
        batch: Images.
        protocol: "batch", or "latency", where each call is waited for.

    Returns:
        A summary, "" where nothing was timed.
    """
    entry = entry_of(name)
    batch = min(batch, SMALL_BATCH) if ctx.small else batch
    of = stamp(ctx)
    there = {
        (r["timm_name"], r["mode"], r["protocol"], r["asked_batch"])
        for r in ctx.rows("model")
        if r["build"] == of["build"] and r["status"] != "failed"
    }
    missing = [m for m in modes if (entry.timm_name, m, protocol, batch) not in there]
    if not missing or ctx.left() <= 0:
        return ""
    baseline = modes[0]
    chosen = [baseline, *(m for m in missing if m != baseline)]
    if entry.network not in _networks:
        _networks.clear()
        timing.release(ctx.device)
        _networks[entry.network] = network_of(name, ctx.device, ctx.small)
    network = _networks[entry.network]
    running: dict[str, _Running] = {}
    base = _Row(ctx, network, protocol, batch, baseline, of)
    for mode in chosen:
        if ctx.left() <= 0:
            break
        found = _prepared(ctx, network, MODES[mode], batch, protocol, base)
        if found is not None:
            running[mode] = found
    _alternate(ctx, network, running, protocol, base)
    timing.release(ctx.device)
    return f"batch {batch}: " + ", ".join(base.said) if base.said else ""


def stamp(ctx: Context) -> dict:
    """What every row says of the code that it measured."""
    hardware = ctx.header["hardware"]
    return {
        "commit": ctx.header["commit"], "build": results.build(hardware),
        "choices": results.choices_digest(hardware), "run": ctx.run,
    }  # fmt: skip


class _Row:
    """Writes the rows of one network at one batch."""

    def __init__(self, ctx, network, protocol, batch, baseline, stamp):
        self.ctx, self.network, self.protocol, self.batch = ctx, network, protocol, batch
        self.baseline, self.stamp, self.said = baseline, stamp, []
        self.peak_rates = {r["name"]: r["value"] for r in ctx.rows("peak_rate")}
        self.note = ", ".join(sorted(ctx.excluded))

    def write(self, mode: Mode, running=None, baseline_per_s=None, **other):
        batch = self.batch if running is None else running.batch
        notes = [other.pop("note", None)]
        if mode.fast and self.note:
            notes.append(f"PyTorch serves {self.note}, which failed the smoke test")
        row = {
            "network": self.network.label, "timm_name": self.network.timm_name,
            "image_size": self.network.image_size, "mode": mode.name, "protocol": self.protocol,
            "asked_batch": self.batch, "batch": batch,
            "channels_last": self.network.channels_last(mode), "runs": MOST,
            "baseline": self.baseline, **self.stamp, **other,
        }  # fmt: skip
        if running is not None:
            summary = timing.summary(running.times)
            per_s = 1e3 * batch / summary["ms_median"]
            tflops = per_s * self.network.flops * (3 if mode.train else 1) / 1e12
            peak_rate = self.peak_rates.get(f"{mode.precision}_tflops")
            row |= summary | {
                "runs": len(running.times), "images_per_s": per_s, "tflops": tflops,
                "fraction_of_peak_rate": tflops / peak_rate if peak_rate else None,
                "relative_error": running.error, "peak_memory_gb": running.peak_gb,
                "host_ms": running.host_ms, "sm_mhz": running.clock.get("sm_mhz"),
                "power_w": running.clock.get("power_w"),
                "speedup": per_s / baseline_per_s if baseline_per_s else None,
            }  # fmt: skip
            notes.append(running.step.skipped)
        row["note"] = "; ".join(filter(None, notes)) or None
        checked = results.ModelRow(**row)  # a field too many or too few shows here
        self.ctx.write("model", **results.asdict(checked))
        return row


def _prepared(ctx, network, mode, batch, protocol, base):
    """The mode warm, checked and with its inputs.

    None where it is unavailable or fails, as a row then says.
    """
    missing = network.why_not(mode)
    if missing:
        base.write(mode, status="unavailable", note=missing)
        return None
    note = None
    while True:
        try:
            with mode.settings():
                return _warm(ctx, network, mode, batch, protocol)
        except torch.OutOfMemoryError:
            note = f"batch {batch} does not fit in memory"
            batch //= 2
            timing.release(ctx.device)
            if batch:
                continue
        except Exception as error:
            base.write(mode, status="failed", note=reason(error))
            base.said.append(f"{mode.name} failed")
            if device_is_lost(error):
                raise
            if not isinstance(error, correctness.Mismatch):
                ctx.say(f"{network.label}, {mode.name}: {reason(error)}")
            return None
        base.write(mode, status="failed", note=note)
        return None


def _warm(ctx, network, mode, batch, protocol):
    device, cuda = ctx.device, ctx.device.type == "cuda"
    before = torch.cuda.memory_allocated(device) if cuda else 0
    step = Step(network, mode)
    images = step.cast(network.batch(batch))
    step(images)  # compiles, captures
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    step(images)
    peak = (torch.cuda.max_memory_allocated(device) - before) / 1e9 if cuda else None
    if cuda and step.engine is not None:  # what its graphs hold counts as free between their runs
        peak += step.engine.memory.workspace / 1e9
    error = correctness.check(network, step, batch)
    (one,) = timing.latency_ms(step, [images], 1, 0, device)
    runs = max(FEWEST, min(MOST, math.floor(1e3 * ROUND_SECONDS / max(one, 1e-3))))
    if protocol == "latency":
        runs = timing.latency_runs(one) // ROUNDS
    if ctx.small:
        runs = 2
    inputs = timing.rotation(lambda: step.cast(network.batch(batch)), images.nbytes, device)
    return _Running(step, batch, error, peak, inputs, runs)


def _alternate(ctx, network, running, protocol, base):
    clock = timing.latency_ms if protocol == "latency" else timing.throughput_ms
    timing.spin_up(ctx.device)
    for turn in range(ROUNDS):
        for name, mode in running.items():
            if ctx.left() <= 0 and mode.times:
                continue  # but the baseline always has its first round
            with mode.step.mode.settings():
                mode.times += clock(
                    mode.step, mode.inputs, mode.runs, WARMUP[turn], ctx.device
                )  # fmt: skip
                mode.clock = last_sample(ctx.folder / CLOCKS)
                if not turn:
                    mode.host_ms = timing.host_ms(mode.step, mode.inputs, 5, ctx.device)
            baseline = running.get(base.baseline)
            per_s = _per_s(baseline) if baseline and baseline.times else None
            row = base.write(mode.step.mode, mode, per_s)
            if turn == ROUNDS - 1:
                times = f" ({row['speedup']:.2f}x)" if row["speedup"] else ""
                base.said.append(f"{name} {row['images_per_s']:,.0f}/s{times}")


def _per_s(running):
    return 1e3 * running.batch / timing.summary(running.times)["ms_median"]
