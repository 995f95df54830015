"""`python -m dsconvert`, which is how torchrun starts it."""

from __future__ import annotations

import os
import sys

# Python looks for modules in the current folder first, which may be a stranger's model with a click.py in it.
if not sys.flags.safe_path and not os.path.samefile(os.path.dirname(os.path.dirname(__file__)), os.getcwd()):
    sys.path[:] = [place for place in sys.path if place not in ("", os.getcwd())]

from dsconvert.cli import main

main()
