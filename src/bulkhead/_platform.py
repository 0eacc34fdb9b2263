"""Refuses systems on which nothing of this could work, with a clear error instead of a missing module."""

import os

if os.name != "posix":
    raise ImportError(
        "bulkhead needs process groups, Unix sockets and fork: Linux, or another POSIX system; this one is "
        + os.name
    )
