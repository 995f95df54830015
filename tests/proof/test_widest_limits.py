"""Which type's absolute limits hold for a file of several: by its tensors, not by what it says of itself."""

from __future__ import annotations

import pytest

from dsconvert.proof.thresholds import widest


@pytest.mark.parametrize(
    ("types", "wanted"),
    [
        ([("q8_0", 100)], "q8_0"),
        ([("q4_k", 90), ("q6_k", 10), ("f32", 1)], "q4_k"),
        ([("q2_k", 6), ("q8_0", 94)], "q2_k"),
        ([("q2_k", 4), ("q8_0", 96)], "q8_0"),  # too few to matter
        ([("iq1_s", 90), ("q8_0", 10)], "q8_0"),
        ([("iq1_s", 90), ("i32", 10)], "iq1_s"),
    ],
)
def test_the_widest_of_the_types_that_matter(types: list[tuple[str, int]], wanted: str) -> None:
    assert widest(types) == wanted
