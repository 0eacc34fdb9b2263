"""The broker on Redis.

Waiting for jobs: each queue has a bell, a list that takes one ring. Whoever makes a job claimable rings, and a claimer that found
nothing waits for the ring (BLPOP), but no longer than until the next job is due, and at most a second. So

- a ring between the look and the wait is not missed: the list keeps it;
- a ring wakes one claimer, not all; if that one leaves due jobs behind, its claim rings for the next one;
- a claimer that dies with the ring in hand, or knows of a job due soon and leaves, delays the others by a second at most (the
  one that leaves in order rings again).

Prior art: the layout of one hash per job and sorted sets by due time is that of taylorchu/work for Go.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import batched
from typing import Any

import msgspec

from bulkhead.backends.base import (
    Broker,
    Burial,
    CancelAnswer,
    Claim,
    Hold,
    Message,
    Place,
    QueueCounts,
    Record,
    Return,
    Standing,
)
from bulkhead.backends.redis.link import Link
from bulkhead.backends.redis.script import script
from bulkhead.errors import MessageTooLarge

__all__ = ["RedisBroker"]
