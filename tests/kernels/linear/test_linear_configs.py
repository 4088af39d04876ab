"""Which tile serves a shape, and how many programs are launched."""

import pytest
from checking import BF16, FP16, FP32

from deit_fast.kernels import _tuned, linear
from deit_fast.kernels._chips import Chip, simulate_device
from deit_fast.kernels.cases import linear_inputs as make_inputs
from deit_fast.kernels.linear import forward
from deit_fast.kernels.linear.configs import (
    AMPERE_CONFIGS,
    FP32_CONFIG,
    HOPPER_CONFIGS,
    configs,
    meta,
)


@pytest.mark.parametrize("persistent", [False, True])
def test_programs(persistent, device, monkeypatch):
    """A program a tile; persistent ones, as many as the chip has SMs."""
    config = HOPPER_CONFIGS[4 if persistent else 0]
    assert config["PERSISTENT"] == persistent
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(forward, "_linear_kernel", Kernel())
    chip = Chip("NVIDIA H9000", (9, 0), 7)
    with simulate_device(chip), _tuned.forced("linear", {"implementation": "triton", **config}):
        for M in (100, 128 * 9):
            inputs = make_inputs(M=M, S=1, K=64, N=256, device=device)
            linear(inputs["x"].half(), inputs["weight"].half(), implementation="triton")
    assert grids == ([(2,), (7,)] if persistent else [(2,), (18,)])


@pytest.mark.parametrize("row_stats", [False, True])
@pytest.mark.parametrize("N", [192, 384, 576, 768, 1000, 3072])
@pytest.mark.parametrize("M", [1, 198, 50_688])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
def test_rule_gives_every_sm_a_tile(M, N, dtype, row_stats):
    """... unless even the smallest tile cannot; and row statistics get whole groups of columns."""
    for chip, num_sms in (((8, 0), 108), ((9, 0), 132), ((10, 0), 148)):
        config = meta(M, N, dtype, chip, num_sms, row_stats)
        assert config in configs(dtype, chip)
        tiles = -(-M // config["BLOCK_M"]) * -(-N // config["BLOCK_N"])
        smallest = config in (HOPPER_CONFIGS[2], AMPERE_CONFIGS[2], FP32_CONFIG)
        assert tiles >= num_sms or smallest or row_stats
        assert not row_stats or config["BLOCK_N"] >= 64
