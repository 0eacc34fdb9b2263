"""Names of jobs, queues and keys as parts of NATS subjects.

A subject is a list of tokens with dots between them, and `*`, `>`, blanks and control characters mean something in it.
Letters, digits, "_" and "-" stand for themselves; every other character becomes "=XX" for each byte of its UTF-8, as in
quoted-printable. What would be longer than 100 characters becomes "==" and a hash. So different names have different
tokens, and no token is read back: what it stands for is in the message.
"""

from __future__ import annotations

import re
from hashlib import blake2b

__all__ = ["consumer_name", "token_of"]

_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,100}")
_ODD = re.compile(r"[^A-Za-z0-9_-]")
# Characters. A consumer's name is the name of a folder of the server (255), and two tokens fit a line of the
# protocol (4096).
_LONGEST = 100


def token_of(name: str) -> str:
    """Return the token of a name."""
    if _PLAIN.fullmatch(name):
        return name
    coded = _ODD.sub(lambda odd: "".join(f"={byte:02X}" for byte in _encoded(odd.group())), name) or "="
    if len(coded) <= _LONGEST:
        return coded
    return "==" + blake2b(_encoded(name), digest_size=20).hexdigest()


def consumer_name(queue_token: str, priority: int) -> str:
    """Return the name of the consumer for a queue and a priority."""
    # Why "=p": no token contains it, so that "a-" with 5 is not "a" with -5.
    return f"{queue_token}=p{priority}"


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")
