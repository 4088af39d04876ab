"""What was measured beside what was predicted."""

import math
from dataclasses import dataclass

from benchmarks.predict import model
from benchmarks.predict.chips import Gpu, of_slug

from .check import Lease

SHOWN = 10  # figures furthest from their prediction


@dataclass(frozen=True)
class Figure:
    """One line of LOG.md: a measurement beside its prediction.

    Attributes:
        run: When it was measured.
        commit: Of the code that was measured.
        what: What it is a figure of.
        unit: Of both figures.
        predicted: None where there is no prediction.
        measured: The measurement.
    """

    run: str
    commit: str
    what: str
    unit: str
    predicted: float | None
    measured: float

    @property
    def ratio(self) -> float | None:
        """Measured over predicted; None where there is no prediction."""
        return self.measured / self.predicted if self.predicted else None

    def __str__(self):
        predicted = f"{self.predicted:,.4g}" if self.predicted else "-"
        ratio = f"{self.ratio:.2f}" if self.ratio else "-"
        return (
            f"{self.what}: predicted {predicted} {self.unit}, measured {self.measured:,.4g}, "
            f"ratio {ratio}"
        )


def figures(lease: Lease) -> list[Figure]:
    """What was measured, beside what was predicted at the peak rates that were measured with it."""
    gpu = of_slug(lease.header["slug"])
    limits = lease.peak_rates
    found = []
    for name, row in {row["name"]: row for row in lease.rows["peak_rate"]}.items():
        unit = "TFLOP/s" if name.endswith("_tflops") else "TB/s"
        predicted = gpu.peak_rates.get(name) if gpu else None
        head = (row["run"], lease.header["commit"], f"peak rate {name}", unit)
        found.append(Figure(*head, predicted, row["value"]))
    for row in lease.models.values():
        if row.status == "measured":
            what = f"{row.network}, {row.mode}, {row.protocol} {row.asked_batch}"
            head = (row.run, row.commit, what, "images/s")
            found.append(Figure(*head, _predicted(row, limits, gpu), row.images_per_s))
    for row in lease.kernels.values():
        if row.status == "measured" and row.mode == "fused":
            what = " ".join(filter(None, (row.op, row.network, row.case, f"batch {row.batch}")))
            head = (row.run, row.commit, what, "ms")
            found.append(Figure(*head, _predicted_ms(row, limits, gpu), row.ms_median))
    return found


def _predicted(row, limits, gpu: Gpu | None):
    if gpu is None or row.protocol != "batch":
        return None
    name, _, distilled = row.network.removeprefix("DeiT-").partition(" ")
    if distilled != "distilled":
        return None
    return model.images_per_s(name, row.mode, row.batch, limits, gpu)


def _predicted_ms(row, limits, gpu: Gpu | None):
    if gpu is None or row.network not in model.NETWORKS or row.dtype != "bf16":
        return None
    format = next((f for f in ("fp8", "int8") if row.case.split()[:1] == [f]), None)
    key = (row.network, row.batch, format, gpu.slug, tuple(sorted(limits.items())))
    if key not in _cache:
        _cache[key] = model.kernel_ms(row.network, row.batch, limits, format, gpu)
    return _cache[key].get((row.op, row.case))


_cache: dict[tuple, dict] = {}


def furthest(found: list[Figure]) -> list[Figure]:
    """The figures that are furthest from their prediction."""
    known = [figure for figure in found if figure.ratio]
    return sorted(known, key=lambda figure: -abs(math.log(figure.ratio)))[:SHOWN]
