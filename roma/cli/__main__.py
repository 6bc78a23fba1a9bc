"""`python -m roma.cli`, the command `roma`."""

import sys

from roma.cli import main

sys.exit(main())
