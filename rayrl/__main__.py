"""`python -m rayrl`: the same as the command `rayrl`."""

from __future__ import annotations

import sys

from rayrl.cli import main

if __name__ == "__main__":
    sys.exit(main())
