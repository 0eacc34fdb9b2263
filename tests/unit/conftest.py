"""For tests of segments, which fill and map them in one process."""

import open_segments
import pytest


@pytest.fixture(autouse=True)
def _segments_of_earlier_tests_do_not_count(request: pytest.FixtureRequest) -> None:
    if hasattr(request.module, "kept_segments"):  # Why not always: it reads the whole map of the process
        open_segments.start_counting()
