"""What a proof scores where nothing else is asked for, whatever command it is part of."""

from __future__ import annotations

WINDOWS, LENGTH, STRIDE = 8, 512, 512  # llama.cpp's length, windows end to end
