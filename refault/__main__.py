"""`python -m refault` is the `refault` command."""

import sys

from refault.cli import main

if __name__ == "__main__":
    sys.exit(main())
