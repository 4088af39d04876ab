"""The chip's peak rates, measured: every fraction of the peak rate is relative to these."""

from deit_fast.bench import peak_rates, timing

from .context import Context


def step(ctx: Context) -> str:
    """Write a row for each rate; returns them."""
    timing.spin_up(ctx.device)
    found = peak_rates.peak_rates(ctx.device, 2 if ctx.small else peak_rates.PEAK_RATE_RUNS)
    for name, value in found.items():
        ctx.write("peak_rate", name=name, value=value)
    return ", ".join(f"{name} {value:,.4g}" for name, value in found.items())
