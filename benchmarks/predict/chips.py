"""The GPUs that predictions are made for."""

from dataclasses import dataclass

from deit_fast.kernels import _chips, _tuned


@dataclass(frozen=True)
class Gpu:
    """A GPU, and peak rates that were measured on another one of its kind.

    Attributes:
        chip: As its driver names it.
        peak_rates: bf16_tflops and copy_tb_per_s, as of `deit_fast.bench.peak_rates.peak_rates`.
    """

    chip: _chips.Chip
    peak_rates: dict

    @property
    def slug(self) -> str:
        """Its folder under benchmarks/results, its table under kernels/tuned."""
        return _tuned.slug(self.chip.name)

    @property
    def label(self) -> str:
        """Its short name: H100."""
        return self.chip.name.split()[1]


H100 = Gpu(
    _chips.Chip("NVIDIA H100 80GB HBM3", (9, 0), 132),
    {"bf16_tflops": 798.0, "copy_tb_per_s": 3.0},
)
H200 = Gpu(_chips.Chip("NVIDIA H200", (9, 0), 132), {"bf16_tflops": 788.0, "copy_tb_per_s": 4.3})
GPUS = {gpu.label.lower(): gpu for gpu in (H100, H200)}


def of_slug(slug: str) -> Gpu | None:
    """The GPU whose results have that folder; None: none that predictions are made for."""
    return next((gpu for gpu in GPUS.values() if gpu.slug == slug), None)
