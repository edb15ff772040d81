"""`python -m quantkit` is `quantkit`."""

from __future__ import annotations

from quantkit.cli.main import run

if __name__ == "__main__":
    run()
