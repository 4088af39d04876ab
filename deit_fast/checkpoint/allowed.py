"""What trainers put beside the tensors, by name: arguments, counters, paths, dates.

A checkpoint is read for its tensors alone. So none of these objects is built: for each name
`torch.load(weights_only=True)` finds a placeholder, which ignores all arguments and state. No
constructor runs, no library need be installed, and a path of another operating system does no harm.
Names that are neither here nor torch's own are refused.
"""

from collections.abc import Callable
from typing import Any


class Ignored:
    """The placeholder of an object that is not built."""

    def __new__(cls, *args: object) -> "Ignored":
        """Ignore the arguments of whatever constructor it stands for."""
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None:
        pass


# torch's unpickler adds items to plain lists and dicts only


def _empty_dict(*args: object) -> dict:
    return {}


def _empty_list(*args: object) -> list:
    return []


def _names(module: str, names: str) -> list[str]:
    return [f"{module}.{name}" for name in names.split()]


_IGNORED = [
    *_names("builtins", "bool bytes dict float frozenset int list object range slice str tuple"),
    *_names("argparse", "Namespace"),
    *_names("types", "SimpleNamespace"),
    *_names("typing", "Any"),
    *_names("datetime", "date datetime time timedelta timezone"),
    *_names("decimal", "Decimal"),
    *_names("fractions", "Fraction"),
    *_names("uuid", "UUID"),
    *_names("numpy", "dtype ndarray"),
    *_names("numpy.core.multiarray", "scalar _reconstruct"),  # before numpy 2
    *_names("numpy._core.multiarray", "scalar _reconstruct"),
    # Hydra's configurations, unless the user gave them a class
    *_names("omegaconf.base", "ContainerMetadata Metadata"),
    *_names("omegaconf.dictconfig", "DictConfig"),
    *_names("omegaconf.listconfig", "ListConfig"),
    *_names("omegaconf.nodes", "AnyNode BooleanNode BytesNode FloatNode IntegerNode"),
    *_names("omegaconf.nodes", "InterpolationResultNode PathNode StringNode"),
    # keys of Lightning's "callbacks" before 1.5
    *_names("pytorch_lightning.callbacks.early_stopping", "EarlyStopping"),
    *_names("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint"),
]
for _module in ("pathlib", "pathlib._local"):  # the latter is Python 3.13's
    _IGNORED += _names(_module, "PosixPath PurePosixPath PureWindowsPath WindowsPath")

# as `torch.serialization.safe_globals` takes them
ALLOWED: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((Ignored, name) for name in _IGNORED),
    (_empty_dict, "collections.defaultdict"),
    (_empty_list, "collections.deque"),
]
