"""What a model launches: one forward pass on the meta device, as if on a given chip."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from deit_fast.engine import data_config
from deit_fast.kernels import _chips, _tuned

# PyTorch's own operations that launch no kernel
_FREE = frozenset(
    "view _unsafe_view reshape slice select unbind split split_with_sizes transpose t expand "
    "permute detach alias as_strided as_strided_ unsqueeze squeeze empty new_empty "
    "unflatten promote_types".split()
)


class Recorder(TorchDispatchMode):
    """Records the operations that are called within it.

    Attributes:
        calls: (operation, arguments, result) of each of deit_fast's operations, in order.
        others: How often each of PyTorch's operations that launches a kernel was called.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, tuple, Any]] = []
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
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
    """Record one forward pass of an accelerated model, as if on a given chip.

    Args:
        model: Moved to the meta device, cast to `dtype` and put in eval mode.
        batch: Images.
        dtype: Of weights and images.
        chip: The chip that is simulated.
        uint8: Whether the images are bytes (batch, height, width, 3), instead of normalized ones.
        tables: Whether tuned tables decide too, or the rules alone.
    """
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
