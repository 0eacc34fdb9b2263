"""Connections that are kept in hand for the scripts.

Why not redis-py's own way to run a command: its pool, retries and records of each command take longer than all the rest
of a round trip. None of them is wanted here, as the link repeats by itself what may be repeated.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from redis import ConnectionPool
from redis.exceptions import ResponseError

__all__ = ["Lines"]


class Lines:
    """Connections out of a pool, which keeps them as in use and closes them with the others.

    Concurrency: any thread; a connection is used by one at a time.

    Args:
        pool: Of the client for one process.
    """

    def __init__(self, pool: ConnectionPool) -> None:
        self._pool = pool
        self._idle: deque[Any] = deque()

    def ask(self, *parts: bytes | str | float) -> Any:
        """Return the answer to one command; raises what redis-py does. One that was hung up meanwhile is made anew."""
        connection = self._taken()
        try:
            connection.send_packed_command(connection.pack_command(*parts), check_health=False)
            return connection.read_response()
        except ResponseError:
            raise
        except BaseException:
            connection.disconnect()  # Why: the answer may still come, and is not that to the next question
            raise
        finally:
            self._idle.append(connection)

    def _taken(self) -> Any:
        try:
            connection = self._idle.pop()
        except IndexError:
            return self._pool.get_connection()
        try:
            is_usable = not connection.can_read()
        except Exception:  # the server has hung up
            is_usable = False
        if not is_usable:
            connection.disconnect()
        return connection
