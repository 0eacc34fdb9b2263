"""What the broker asks of SQLite. `schema.py` says what the columns mean."""

from __future__ import annotations

from bulkhead.backends.base import Place
from bulkhead.backends.sqlite.file import BATCH
from bulkhead.backends.sqlite.schema import DEAD, READY, RUNNING, SCHEDULED

ENQUEUE = """
INSERT INTO jobs (namespace, id, queue, state, rank, due, visible, enqueued, remember, body)
SELECT ?, ?, ?, ?, ?, ?, ?, ?, ?, ?
WHERE NOT EXISTS (SELECT 1 FROM taken WHERE namespace = ? AND id = ? AND until > ?)
ON CONFLICT (namespace, id) DO NOTHING
"""

IS_PAUSED = "SELECT 1 FROM paused WHERE namespace = ? AND queue = ?"

FIRST_READY = f"SELECT 1 FROM jobs WHERE namespace = ? AND queue = ? AND state = {READY} LIMIT 1"

NEXT_VISIBLE = "SELECT MIN(visible) FROM jobs WHERE namespace = ? AND queue = ? AND visible IS NOT NULL"

MAKE_READY = f"""
UPDATE jobs SET state = {READY}, visible = NULL WHERE seq IN (
    SELECT seq FROM jobs WHERE namespace = ? AND queue = ? AND visible <= ? ORDER BY visible LIMIT {BATCH}
)
"""

# Why casts: SQLite keeps whatever was written into a column, and one damaged row must not hold up a whole queue.
_BODY = "CAST(body AS BLOB)"
_FACTS = ", ".join(
    f"CAST({column} AS {kind})"
    for column, kind in (
        ("rank", "INTEGER"),
        ("attempt", "INTEGER"),
        ("enqueued", "REAL"),
        ("due", "REAL"),
    )
)
_ERROR = "CAST(error AS BLOB)"

IN_LINE = f"""
SELECT seq, id, {_BODY}, {_FACTS}, {_ERROR} FROM jobs
WHERE namespace = ? AND queue = ? AND state = {READY} ORDER BY rank, due, seq LIMIT ?
"""

TAKE = f"UPDATE jobs SET state = {RUNNING}, visible = ?, token = ?, attempt = attempt + 1 WHERE seq = ?"

# Why by token alone: a job whose lease ran out, be it READY by now, has its token until somebody claims it.
HELD = "namespace = ? AND id = ? AND token = ?"

RENEW = f"UPDATE jobs SET state = {RUNNING}, visible = ? WHERE {HELD} RETURNING is_cancelled"

NACK = f"""
UPDATE jobs SET state = ?, due = ifnull(?, due), visible = ?, token = NULL, attempt = attempt - ?,
    error = ifnull(?, error)
WHERE {HELD}
"""

BURY = f"""
UPDATE jobs SET state = {DEAD}, due = ?, visible = NULL, token = NULL, reason = ?, error = ifnull(?, error)
WHERE {HELD}
"""

REMOVE_HELD = f"DELETE FROM jobs WHERE {HELD} RETURNING remember"

REMOVE_IDLE = f"""
DELETE FROM jobs WHERE namespace = ? AND id = ? AND (state <> {RUNNING} OR visible <= ?) AND (state <> {DEAD} OR ?)
RETURNING remember
"""

REMOVE_DEAD = f"DELETE FROM jobs WHERE namespace = ? AND id = ? AND state = {DEAD} RETURNING remember"

REQUEST = f"UPDATE jobs SET is_cancelled = 1 WHERE namespace = ? AND id = ? AND state = {RUNNING}"

REMEMBER = "INSERT OR REPLACE INTO taken (namespace, id, until) VALUES (?, ?, ?)"

REVIVE = f"""
UPDATE jobs
SET seq = (SELECT MAX(seq) + 1 FROM jobs), state = {READY}, due = ?, enqueued = ?,
    attempt = 0, reason = '', error = NULL, is_cancelled = 0
WHERE namespace = ? AND id = ? AND state = {DEAD}
"""

RECORD = f"""
SELECT id, queue, state, {_BODY}, {_FACTS}, visible, reason, {_ERROR}, is_cancelled FROM jobs
"""

# Of each place: which jobs are in it, and their order. :now is the time.
PLACES = {
    Place.READY: (f"(state = {READY} OR visible <= :now)", "rank, due, seq"),
    Place.SCHEDULED: (f"visible > :now AND state = {SCHEDULED}", "visible, seq"),
    Place.RUNNING: (f"visible > :now AND state = {RUNNING}", "rank, due, seq"),
    Place.DEAD: (f"state = {DEAD}", "due DESC, seq DESC"),
}

COUNT_READY = f"""
SELECT queue, COUNT(*), CAST(MIN(due) AS REAL) FROM jobs INDEXED BY jobs_ready
WHERE namespace = ? AND state = {READY} GROUP BY queue
"""
COUNT_LAPSED = """
SELECT queue, COUNT(*), CAST(MIN(due) AS REAL) FROM jobs WHERE namespace = ? AND visible <= ? GROUP BY queue
"""
COUNT_LATER = """
SELECT queue, state, COUNT(*) FROM jobs INDEXED BY jobs_later
WHERE namespace = ? AND visible > ? GROUP BY queue, state
"""
COUNT_DEAD = f"""
SELECT queue, COUNT(*) FROM jobs INDEXED BY jobs_dead WHERE namespace = ? AND state = {DEAD} GROUP BY queue
"""
