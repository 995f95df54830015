"""`python -m dsconvert`, which is how torchrun starts it."""

from __future__ import annotations

from dsconvert.cli import main

main()
