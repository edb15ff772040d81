"""The scripts of benchmarks/ import each other by name, from their own folder."""

from __future__ import annotations

import sys

from tests.cli.running import ROOT

sys.path.append(str(ROOT / "benchmarks"))
