"""`python -m rgsd`."""

import sys

from rgsd.cli import main

sys.exit(main())
