"""`python -m roma` is the command `roma`, for launchers that start a module."""

import sys

from roma.cli import main

sys.exit(main())
