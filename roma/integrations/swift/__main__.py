"""`python -m roma.integrations.swift`: prints the path for `swift rlhf --external_plugins`."""

import sys

from roma.integrations.options import RomaOptions
from roma.integrations.swift import plugin_path


def main() -> int:
    """Prints the path, once ROMA_OPTIONS was read."""
    try:
        RomaOptions.from_env()
    except (ValueError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 2
    print(plugin_path())
    return 0


if __name__ == "__main__":
    sys.exit(main())
