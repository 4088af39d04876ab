"""Stand-ins for a GPU, from the tests' helpers: launches and PyTorch's operators are no-ops."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from deit_fast.kernels import _chips, _plan_library

from .turns import Contender

HELPERS = Path(__file__).parents[2] / "tests" / "helpers"


@dataclass(frozen=True)
class StandIns:
    """A GPU, PyTorch's operators and CUDA graphs, none of them there."""

    gpu: object
    operators: object
    no_graphs: Callable[[], AbstractContextManager]

    @classmethod
    def install(cls) -> "StandIns":
        """Put the stand-ins in place, for good, in this process.

        Raises:
            RuntimeError: Something that they need is missing.
        """
        if _chips.INTERPRET:
            raise RuntimeError(
                "TRITON_INTERPRET is 1, expected it unset: kernels have to be launched"
            )
        if not (HELPERS / "stand_in_cuda").is_dir():
            raise RuntimeError(f"no stand_in_cuda in {HELPERS}, expected a checkout with its tests")
        if str(HELPERS) not in sys.path:
            sys.path.append(str(HELPERS))
        import stand_in_cuda
        from stand_in_cuda.graphs import no_graphs
        from stand_in_cuda.operators import Operators

        try:
            found = cls(stand_in_cuda.install(), Operators(), no_graphs)
        except FileNotFoundError as error:
            raise RuntimeError(
                f"no compiler {error.filename!r}, expected one of C and C++"
            ) from error
        except subprocess.CalledProcessError as error:
            raise RuntimeError(f"{error.cmd[0]} failed, expected compilers of C and C++") from error
        _plan_library.wait()
        return found

    def launches(self, contender: Contender) -> tuple[int, int]:
        """Launches of one call: Triton's, and those of PyTorch's own operators."""
        self.gpu.forget()
        before = self.operators.calls
        with contender.within():
            contender.call()
        if self.gpu.reasons():
            raise RuntimeError(f"refused: {self.gpu.reasons()[0]}")
        return len(self.gpu.launches()), self.operators.calls - before

    def working(self, contender: Contender) -> list[str]:
        """PyTorch's operators that would compute in a call."""
        with contender.within():
            return self.operators.working(contender.call)
