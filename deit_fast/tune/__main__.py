"""`python -m deit_fast.tune`."""

import sys

from .options import main

sys.exit(main())
