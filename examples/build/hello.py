#!/usr/bin/env python3
"""Say what the image that was built is like."""

import os
import platform
import sys
from pathlib import Path

gpus = sorted(path.name for path in Path("/dev").glob("nvidia[0-9]*"))
print(f"Python {platform.python_version()} of {sys.prefix}, in {Path.cwd()}, uid {os.getuid()}")
print(f"GPUs visible: {' '.join(gpus) or 'none'}")
