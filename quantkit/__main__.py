"""`python -m quantkit` is `quantkit`."""

from __future__ import annotations

import sys

from quantkit.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
