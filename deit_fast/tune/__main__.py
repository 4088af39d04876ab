"""`python -m deit_fast.tune`."""

import sys

from .command import main

sys.exit(main())
