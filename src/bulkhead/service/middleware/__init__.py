"""Middlewares: one file each. `Middleware` is the base for one's own."""

from bulkhead.service.middleware.base import Middleware, Submission
from bulkhead.service.middleware.concurrency_limit import ConcurrencyLimit
from bulkhead.service.middleware.discard_after import DiscardAfter
from bulkhead.service.middleware.discard_invalid import DiscardInvalid
from bulkhead.service.middleware.discard_too_old import DiscardTooOld
from bulkhead.service.middleware.heartbeat import ConsumerInfo, Heartbeat, consumers
from bulkhead.service.middleware.local_limit import LocalLimit
from bulkhead.service.middleware.log_jobs import LogJobs
from bulkhead.service.middleware.poll_throttle import PollThrottle
from bulkhead.service.middleware.rate_limit import RateLimit
from bulkhead.service.middleware.unique import Unique

__all__ = [
    "ConcurrencyLimit",
    "ConsumerInfo",
    "DiscardAfter",
    "DiscardInvalid",
    "DiscardTooOld",
    "Heartbeat",
    "LocalLimit",
    "LogJobs",
    "Middleware",
    "PollThrottle",
    "RateLimit",
    "Submission",
    "Unique",
    "consumers",
]
