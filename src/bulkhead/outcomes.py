"""How an attempt ended, in the words of a timeline."""

__all__ = ["Outcome"]


class Outcome:
    """How an attempt ended, as the words that a timeline shows."""

    SUCCEEDED = "succeeded"
    FAILED = "failed"
    TIMED_OUT = "timed out"
    CRASHED = "crashed"
    CANCELLED = "cancelled"
    RETRIED = "retried"  # failed in whatever way, and another attempt follows
    RUNNING = "running"

    ALL = SUCCEEDED, FAILED, TIMED_OUT, CRASHED, CANCELLED, RETRIED, RUNNING
