"""The tuning command on a simulated chip, with a made-up clock."""

import torch

import deit_fast
from deit_fast._argparse import Parser
from deit_fast.kernels import _chips, _tuned
from deit_fast.kernels.linear import configs as LINEAR
from deit_fast.kernels.quantized_linear import configs as QUANTIZED_LINEAR
from deit_fast.tune import command, operations, options

CHIP = _chips.Chip("NVIDIA H9000", (9, 0), 4)
NAME = "deit_tiny_distilled"
FP16 = torch.float16
# all of their configurations, of which a test may leave some out
HOPPER_CONFIGS, WIDE_BACKWARD_CONFIG = LINEAR.HOPPER_CONFIGS, LINEAR.WIDE_BACKWARD_CONFIG
QUANTIZED_CONFIGS = QUANTIZED_LINEAR.HOPPER_CONFIGS


def meta_model(name=NAME, **keywords):
    with torch.device("meta"):
        return deit_fast.create_model(name, backend="triton", **keywords)


def run(clock, *arguments):
    parser = Parser()
    options.add_arguments(parser)
    args = ["--model", NAME, "--dtype", "fp16", "--batch", "12", *arguments]
    return command.run(parser.parse_args(args), clock)


def prefer(favourite):
    """A clock that finds `favourite`, if it is among the candidates, the fastest."""

    def clock(call, inputs):
        choices = [tuple(c.items()) for c in _tuned._forced.values()]
        return 1.0 if any(set(favourite.items()) <= set(c) for c in choices) else 2.0

    return clock


def replace_linear(monkeypatch, function):
    """In all tasks that call `linear`."""
    monkeypatch.setattr(operations.linear, "linear", function)
    monkeypatch.setattr(operations.layer_norm_linear, "linear", function)
