"""What trainers put beside the tensors, by name: arguments, counters, paths, dates.

A checkpoint is read for its tensors alone. So nothing of this is built: `torch.load(weights_only=
True)` finds an empty stand-in under each name, which takes any arguments and any state and ignores
them. No constructor runs, no library need be installed, and a path of the other system is no
trouble. Names that are neither here nor torch's own are refused.
"""


class Ignored:
    """Where an object was."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


# torch's unpickler puts items into plain lists and dicts alone


def _empty_dict(*args):
    return {}


def _empty_list(*args):
    return []


def _names(module, names):
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
    # of configurations without a class of the user's own: Hydra's
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
ALLOWED = [
    *((Ignored, name) for name in _IGNORED),
    (_empty_dict, "collections.defaultdict"),
    (_empty_list, "collections.deque"),
]
