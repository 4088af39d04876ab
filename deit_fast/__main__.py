"""`python -m deit_fast`: the command, for torchrun -m."""

import sys

from .cli import main

sys.exit(main())
