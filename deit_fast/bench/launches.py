"""What a model launches: one forward pass on the meta device, as if on a given chip."""

from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast.engine import data_config
from deit_fast.kernels import _chips, _tuned

# of PyTorch's own operations, those that launch nothing
_FREE = frozenset(
    "view _unsafe_view reshape slice select unbind split split_with_sizes transpose t expand "
    "permute detach alias as_strided as_strided_ unsqueeze squeeze empty new_empty "
    "unflatten promote_types".split()
)


class Recorder(TorchDispatchMode):
    """`calls`: (operation, arguments, result) of each of deit_fast's operations, in order;
    `others`: how often each operation of PyTorch's that launches something."""

    def __init__(self):
        super().__init__()
        self.calls, self.others = [], Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        if space == "deit_fast":
            self.calls.append((name, args, result))
        elif name not in _FREE:
            self.others[name] += 1
        return result


def record(
    model: nn.Module, batch: int, dtype: torch.dtype, chip: _chips.Chip, uint8: bool = False,
    tables: bool = True,
) -> Recorder:  # fmt: skip
    """Inference of an accelerated `model`, which is moved to the meta device. tables: whether tuned
    tables count, or only the rules."""
    channels, *size = data_config(model)["input_size"]
    model = model.to("meta", dtype).eval()
    if uint8:
        image = torch.empty(batch, *size, channels, device="meta", dtype=torch.uint8)
    else:
        image = torch.empty(batch, channels, *size, device="meta", dtype=dtype)
    with _chips.simulate_device(chip), _tuned.disabled(not tables), torch.no_grad():
        with Recorder() as recorder:
            model(image)
    return recorder
