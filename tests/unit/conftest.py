"""For tests of segments, which fill and map them in one process."""

import open_segments
import pytest


@pytest.fixture(autouse=True)
def _segments_of_earlier_tests_do_not_count() -> None:
    open_segments.start_counting()
