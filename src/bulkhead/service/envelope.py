"""What a message of the queue says: which task to call with what, and what follows. The only place that knows the wire.

    body     = format byte, then the envelope       (format "1")
             | format byte, signature, the envelope (format "2", HMAC-SHA256 over namespace, id, queue and envelope)
    envelope = MessagePack array, see `Envelope`; `payload` in it is the arguments in the codec that it names

Trust: nothing of a body is looked at before its signature is verified, where the application has a key. Pickle is read
only in signed bodies. A task's name is looked up in the application's own list, nothing is imported by it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import pickle
import sys
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec

from bulkhead.errors import BadMessage, ConfigError, ConfigTypeError

__all__ = [
    "CODECS",
    "Bundle",
    "CodecName",
    "Envelope",
    "Failure",
    "Follow",
    "Sealer",
    "decoded",
    "encoded",
    "failure",
    "failure_of",
]

CodecName = Literal["msgpack", "json", "pickle"]

_PLAIN = b"1"
_SIGNED = b"2"
_SIGNATURE_BYTES = 32
_SHORTEST_KEY = 16

# Why bounds: they are kept with each job that has failed, and sent with each of its messages.
_TRACEBACK_CHARACTERS = 20_000
_MESSAGE_CHARACTERS = 10_000


# Bounds of what a message may say, as those of the options that it comes from: whoever made it.
_FOREVER = sys.float_info.max  # so no infinity
_Seconds = Annotated[float, msgspec.Meta(ge=0, le=_FOREVER)]
_Timeout = Annotated[float, msgspec.Meta(gt=0, le=_FOREVER)]
_Factor = Annotated[float, msgspec.Meta(ge=1, le=_FOREVER)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Count = Annotated[int, msgspec.Meta(ge=0)]


class Follow(msgspec.Struct, array_like=True, frozen=True):
    """A job that is enqueued when another has ended."""

    id: str
    queue: str
    priority: int
    delay: float
    due_at: float | None
    envelope: Envelope


class Envelope(msgspec.Struct, array_like=True, frozen=True):
    """A job as it travels.

    Attributes:
        task: Its name in the application.
        payload: (args, kwargs) in `codec`.
        timeout: Longest run of an attempt in seconds.
        max_retries: How many attempts may follow the first.
        backoff: (initial, factor, jitter, maximum) in seconds and shares.
        keep: Seconds for which its outcome is kept.
        on_success, on_error: Jobs that follow.
        previous: Of a job that follows another: what that has returned, or its failure, in `codec`.
        takes: `previous` is its first argument.
        headers: What middlewares have added in the producer.
        bundle: Of a group or chain: its jobs; then `task` is "" and the consumer only enqueues them.
    """

    task: str
    payload: bytes
    codec: str = "msgpack"
    timeout: _Timeout | None = None
    max_retries: _Count = 0
    backoff: tuple[_Seconds, _Factor, _Share, _Seconds] = (1.0, 1.6, 0.2, 3600.0)
    keep: _Seconds = 86400.0
    on_success: tuple[Follow, ...] = ()
    on_error: tuple[Follow, ...] = ()
    previous: bytes | None = None
    takes: bool = False
    headers: dict[str, str] = {}
    bundle: Bundle | None = None


class Bundle(msgspec.Struct, array_like=True, frozen=True):
    """The jobs of a group, or the first one of a chain, which holds the others as what follows it.

    Attributes:
        n: How many jobs there are.
        keep: Seconds for which it is known.
        kinds: Jobs without ids and arguments; most of a group are alike.
        members: (position, which of the kinds, payload) of each job to be enqueued.
        others: Ids of jobs that stand for those at these positions, which are not enqueued.
    """

    is_chain: bool
    n: int
    keep: float
    kinds: tuple[Follow, ...]
    members: tuple[tuple[int, int, bytes], ...]
    others: dict[int, str]


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """What a job has failed with, as it is kept."""

    type: str
    message: str
    traceback: str = ""


_pack = msgspec.msgpack.Encoder().encode
_unpack_envelope = msgspec.msgpack.Decoder(Envelope).decode
_unpack_failure = msgspec.msgpack.Decoder(Failure).decode

_load_msgpack = msgspec.msgpack.Decoder().decode


def _dump_json(value: Any) -> bytes:
    # Why not msgspec's: it writes NaN as null and bytes as text, and nobody is told.
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    return text.encode()


_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "msgpack": _pack,
    "json": _dump_json,
    "pickle": lambda value: pickle.dumps(value, pickle.HIGHEST_PROTOCOL),
}
_DECODERS: dict[str, Callable[[bytes], Any]] = {
    "msgpack": _load_msgpack,
    "json": json.loads,
    "pickle": pickle.loads,
}
CODECS = tuple(_ENCODERS)


def encoded(codec: str, value: Any) -> bytes:
    """Return a value in a codec.

    Raises:
        Exception: What the codec says of a value that it cannot take; of msgspec a TypeError, of pickle anything.
    """
    return _ENCODERS[codec](value)


def decoded(codec: str, data: bytes) -> Any:
    """Return the value that was encoded. Pickle: only what came out of a signed body.

    Raises:
        BadMessage: The data is not in this codec, or there is no such codec.
    """
    if codec not in _DECODERS:
        raise BadMessage(f"there is no codec {codec!r}; known are {', '.join(CODECS)}")
    try:
        return _DECODERS[codec](data)
    except Exception as error:  # of msgspec its own or RecursionError, of pickle anything
        raise BadMessage(f"it is not {codec}: {type(error).__name__}: {error}") from error


def failure_of(error: BaseException, trace: str = "") -> bytes:
    """Return the description of an error that is kept with a job."""
    name = type(error).__qualname__
    try:
        text = str(error)
    except Exception:  # a __str__ of the user's that raises
        text = "<its text could not be made>"
    return _pack(Failure(_clean(name), _clean(_shortened(text)), _clean(trace)[-_TRACEBACK_CHARACTERS:]))


def failure(data: bytes | None) -> Failure | None:
    """Return the description that was kept; None for none, and for one that cannot be read."""
    if data is None:
        return None
    try:
        return _unpack_failure(data)
    except msgspec.MsgspecError:
        return Failure("unknown", "the description of the failure cannot be read")


class Sealer:
    """Turns envelopes into bodies and back; the key, when there is one, never leaves it.

    Args:
        namespace: Part of what is signed, so that a message is worth nothing in another one.
        key: At least 16 bytes; None leaves bodies unsigned, and then pickle is refused.
        codec: In which arguments and results are written.

    Raises:
        ConfigError: The codec is unknown, or it is pickle and there is no key, or the key is too short.
    """

    def __init__(self, namespace: str, key: bytes | str | None, codec: str) -> None:
        if codec not in CODECS:
            raise ConfigError(f"codec must be one of {', '.join(CODECS)}, not {codec!r}")
        self._key = _key(key)
        if codec == "pickle" and self._key is None:
            raise ConfigError(
                'codec="pickle" needs key=, a secret of at least 16 bytes that all producers and workers share: '
                "messages that it does not sign are never unpickled"
            )
        self._salt = namespace.encode()
        self.codec = codec

    def seal(self, job_id: str, queue: str, envelope: Envelope) -> bytes:
        """Return the body of a message."""
        data = _pack(envelope)
        return _PLAIN + data if self._key is None else _SIGNED + self._sign(job_id, queue, data) + data

    def open(self, job_id: str, queue: str, body: bytes) -> Envelope:
        """Return what a body says.

        Raises:
            BadMessage: It is not signed with our key, or cannot be decoded.
        """
        data = self._verified(job_id, queue, body)
        try:
            envelope = _unpack_envelope(data)
        except Exception as error:  # a MsgspecError, or RecursionError of one that is made to raise it
            raise BadMessage(f"it is no envelope: {error}") from None
        if envelope.codec not in CODECS:
            raise BadMessage(f"there is no codec {envelope.codec!r}; known are {', '.join(CODECS)}")
        if envelope.codec == "pickle" and self._key is None:
            raise BadMessage("it holds pickled arguments and is not signed; such are never read")
        return envelope

    def bare(self, body: bytes) -> bytes:
        """Return the packed envelope of a body that `open` has taken."""
        return body[1:] if self._key is None else body[1 + _SIGNATURE_BYTES :]

    def seal_value(self, job_id: str, codec: str, data: bytes) -> bytes:
        """Return an encoded result as it is kept."""
        data = codec.encode() + b"\0" + data
        return _PLAIN + data if self._key is None else _SIGNED + self._sign(job_id, "", data) + data

    def open_value(self, job_id: str, kept: bytes) -> Any:
        """Return a result.

        Raises:
            BadMessage: It is not signed with our key, or cannot be decoded.
        """
        codec, _, data = self._verified(job_id, "", kept).partition(b"\0")
        if codec == b"pickle" and self._key is None:
            raise BadMessage("it is pickled and not signed; such are never read")
        return decoded(codec.decode("ascii", "replace"), data)

    def _verified(self, job_id: str, queue: str, body: bytes) -> bytes:
        kind, rest = body[:1], body[1:]
        if self._key is None:
            if kind == _SIGNED:
                raise BadMessage("it is signed, and this application has no key to verify it with")
            if kind != _PLAIN:
                raise BadMessage("it begins with no known format")
            return rest
        if kind != _SIGNED:
            raise BadMessage("it is not signed")
        signature, data = rest[:_SIGNATURE_BYTES], rest[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._sign(job_id, queue, data)):
            raise BadMessage("its signature is wrong: it was changed, or signed with another key")
        return data

    def _sign(self, job_id: str, queue: str, data: bytes) -> bytes:
        assert self._key is not None
        # Why lengths: no two different triples may be the same text.
        parts = (self._salt, job_id.encode("utf-8", "surrogatepass"), queue.encode("utf-8", "surrogatepass"))
        head = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.digest(self._key, head + data, hashlib.sha256)


def _key(key: bytes | str | None) -> bytes | None:
    if key is None:
        return None
    if not isinstance(key, (bytes, str)):
        raise ConfigTypeError(f"key must be bytes or a str, not of type {type(key).__name__}")
    made = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else bytes(key)
    if len(made) < _SHORTEST_KEY:
        raise ConfigError(f"key must have at least {_SHORTEST_KEY} bytes, not {len(made)}")
    return made


def _shortened(text: str) -> str:
    return text if len(text) <= _MESSAGE_CHARACTERS else text[:_MESSAGE_CHARACTERS] + " …"


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
