"""scripts/supply/ holds scripts, which see each other as modules."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "supply"))
