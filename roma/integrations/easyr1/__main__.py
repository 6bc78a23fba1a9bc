"""`python -m roma.integrations.easyr1`."""

import sys

from roma.integrations.easyr1.launch import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
