"""`python -m deit_fast.tune`."""

import sys

from .entry import main

sys.exit(main())
