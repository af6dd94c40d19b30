#!/usr/bin/env python3
"""Print the results of the sweep, the best first."""

from __future__ import annotations

import json
import sys
from pathlib import Path

results = [json.loads(path.read_text()) for path in Path(sys.argv[1]).glob("*.json")]
for result in sorted(results, key=lambda entry: (-entry["accuracy"], entry["lr"], entry["momentum"])):
    print(f"{result['accuracy']:.3f}  lr {result['lr']:g}  momentum {result['momentum']:g}")
