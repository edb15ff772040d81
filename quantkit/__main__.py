"""`python -m quantkit` is `quantkit`."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    if not sys.flags.safe_path:
        # The working folder, which may be a stranger's: its torch.py is not to be imported.
        sys.path.pop(0)

    from quantkit.cli.entry import run

    run()
