"""Pickling both ways: jobs in the caller, outcomes in the worker; each failure is found where it is made.

The caller pickles a job before it claims anything, so that a job that cannot be pickled costs no worker. The worker
pickles results and proves that an exception can be rebuilt before it sends it, and sends its text if it cannot.
"""

from __future__ import annotations

import pickle
import struct
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType, TracebackType
from typing import Any

from bulkhead.engines.processes import heritage
from bulkhead.engines.processes.parcels import LARGE_BODY, Callback, Parcel, Token, parcel_of
from bulkhead.engines.processes.segments import SegmentPool
from bulkhead.errors import JobNotPicklable, RemoteError, RemoteTraceback, is_of, type_name_of

__all__ = [
    "NONE",
    "SHARED_IS_FOR_JOBS",
    "cannot",
    "cannot_pack_result",
    "message_of",
    "pack_call",
    "pack_error",
    "pack_initializer",
    "pack_without_main",
    "text_of",
    "pack_value",
    "unpack_call",
    "unpack_error",
    "unpack_value",
]

_PROTOCOL = 5
_SIZE = struct.Struct("<I")
_NO_FUNCTION = _SIZE.pack(0)

# Looking at the types of more arguments than this takes longer than a callback (and a map has thousands).
_FEW = 8

SHARED_IS_FOR_JOBS = "a Shared can be given to jobs alone, not to an initializer"

# Types that have no buffers to send out of band.
_PLAIN = frozenset({type(None), bool, int, float, complex, str, bytes})

# What most jobs return, pickled once.
NONE = pickle.dumps(None, _PROTOCOL)

# Functions known here: in the caller their bytes, in a worker the functions. Why: a function that is pickled by name is
# the same for ever, and finding the name is the larger part of pickling a small job. Emptied when it gets this large.
_MAX_FUNCTIONS = 1024
_packed: dict[Callable[..., Any], bytes] = {}
_unpacked: dict[bytes, Callable[..., Any]] = {}

# Why not the attribute: a class of the user's may have one of its own.
_traceback_of: Callable[[BaseException], TracebackType | None] = vars(BaseException)["__traceback__"].__get__

Call = tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]


def pack_call(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    segments: SegmentPool | None,
    what: str = "job",
) -> bytes | Parcel:
    """Return a call, packed: the function and the arguments, pickled apart so that both sides know it again.

    Args:
        fn: The function.
        args: Positional arguments, or whatever sequence the worker is to get.
        kwargs: Keyword arguments.
        segments: Where large parts go; None packs everything into bytes.
        what: Names it in an error.

    Raises:
        JobNotPicklable: With the reason, and with what to install where that would help.
    """
    try:
        packed = (_packed.get(fn) or _packed_function(fn)) if type(fn) is FunctionType else _NO_FUNCTION
        if packed is not _NO_FUNCTION and not args and not kwargs:
            return packed
        if packed is _NO_FUNCTION:
            # It may carry data of its own: a method, a partial.
            return _packed_value((fn, args, kwargs), packed, segments, is_plain=False)
        return _packed_value((args, kwargs), packed, segments, is_plain=not kwargs and _are_plain(args))
    except JobNotPicklable:
        raise
    except Exception as error:  # arbitrary code of the user's objects runs here
        return _pack_closure((fn, args, kwargs), segments, what, error)


def pack_initializer(fn: Callable[..., Any], args: Sequence[Any]) -> bytes:
    """Return an initializer's call, packed; what new processes inherit may be among the arguments (see heritage.py).

    Raises:
        JobNotPicklable: With the reason.
    """
    call: Call = fn, args, {}
    buffers: list[pickle.PickleBuffer] = []
    try:
        body = _NO_FUNCTION + heritage.dumps(call, _PROTOCOL, buffers.append)
        packed = _with_buffers(call, _NO_FUNCTION, body, buffers, None, heritage.dumps)
    except JobNotPicklable:
        raise
    except Exception as error:
        packed = _pack_closure(call, None, "initializer", error, may_inherit=True)
    assert isinstance(packed, bytes)
    return packed


def pack_without_main(
    fn: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    segments: SegmentPool | None,
    what: str = "job",
) -> bytes | Parcel:
    """As `pack_call`, for workers that cannot import the caller's main module: what that defines goes by value."""
    makers = (fn, *map(type, args), *map(type, kwargs.values()))
    if not any(getattr(maker, "__module__", None) == "__main__" for maker in makers):
        return pack_call(fn, args, kwargs, segments, what)
    return _pack_closure(
        (fn, args, kwargs),
        segments,
        what,
        TypeError(
            "workers cannot import the main module (python -c, standard input, a notebook, python -m with a package), "
            "where it is defined; put it into a module, or use start_method='fork'"
        ),
    )


def unpack_call(body: memoryview | bytes | bytearray, buffers: Sequence[memoryview] = ()) -> Call:
    """Return the call that `pack_call` packed."""
    (size,) = _SIZE.unpack_from(body)
    if size == 0:
        return pickle.loads(memoryview(body)[_SIZE.size :], buffers=buffers)  # type: ignore[no-any-return]
    end = _SIZE.size + size
    fn = _unpacked_function(bytes(body[_SIZE.size : end]))
    if len(body) == end:
        return fn, (), {}
    args, kwargs = pickle.loads(memoryview(body)[end:], buffers=buffers)
    return fn, args, kwargs


def pack_value(value: Any, segments: SegmentPool) -> bytes | Parcel:
    """Return a job's result, packed; raises whatever its pickling raises."""
    if value is None:
        return NONE
    try:
        return _packed_value(value, b"", segments, is_plain=type(value) in _PLAIN)
    except Exception as error:
        packed = _cloudpickled(value)
        if packed is None:
            raise error
        return packed


def unpack_value(body: memoryview | bytes | bytearray, buffers: Sequence[memoryview] = ()) -> Any:
    """Return a job's result; raises whatever its rebuilding raises."""
    if body == NONE:
        return None
    return pickle.loads(body, buffers=buffers)


def pack_error(error: BaseException) -> bytes:
    """Return the bytes of what a job raised: always succeeds, with the text alone if need be."""
    # Why from the second entry: the first is the worker's own call.
    tb = _traceback_of(error)
    text = text_of(error, tb.tb_next if tb is not None else None)
    facts = (type_name_of(error), message_of(error), text)
    return pickle.dumps((*facts, _rebuildable(error)), _PROTOCOL)


def unpack_error(body: memoryview | bytes | bytearray) -> BaseException:
    """Return the exception that a job raised, with the remote traceback as its cause, or a RemoteError of its text."""
    type_name, message, text, packed = pickle.loads(body)
    original = None
    if packed is not None:
        try:
            error: BaseException = pickle.loads(packed)
            if is_of(error, Exception):
                error.__cause__ = RemoteTraceback(text)
                return error
            original = (
                error  # Why not returned: raised from result(), SystemExit and its like would end the caller.
            )
        except KeyboardInterrupt:
            raise
        except BaseException as reason:  # the class may be missing here, or may refuse to be made or changed
            text += f"\nThe exception could not be rebuilt in the caller: {message_of(reason)}\n"
    remote = RemoteError(f"{type_name}: {message}", type_name=type_name, traceback=text, original=original)
    remote.__cause__ = RemoteTraceback(text)
    return remote


def cannot(what: str, error: BaseException, **facts: Any) -> RemoteError:
    """Return the error for something of the user's that could not be packed or rebuilt."""
    name = type_name_of(error)
    wrapped = RemoteError(f"{what}: {name}: {message_of(error)}", type_name=name, **facts)
    wrapped.__cause__ = error
    return wrapped


def cannot_pack_result(value: Any, error: BaseException) -> RemoteError:
    """Return the error for a result that could not be pickled, with what that raised if it can be sent."""
    original = None if _rebuildable(error) is None else error
    return cannot(
        f"the job's result of type {type(value).__qualname__} cannot be pickled", error, original=original
    )


def message_of(error: BaseException) -> str:
    """Return the error's text whatever its `__str__` does."""
    try:
        return "".join((str(error),))  # Why join: `str()` may give an instance of a subclass
    except BaseException:
        return "<its text could not be made>"


def _packed_value(value: Any, head: bytes, segments: SegmentPool | None, *, is_plain: bool) -> bytes | Parcel:
    if is_plain:
        # Why apart: a callback costs as much as the pickling of two numbers.
        body = head + pickle.dumps(value, _PROTOCOL)
        return _with_buffers(value, head, body, [], segments) if len(body) >= LARGE_BODY else body
    buffers: list[pickle.PickleBuffer] = []
    body = head + pickle.dumps(value, _PROTOCOL, buffer_callback=buffers.append)
    if buffers or len(body) >= LARGE_BODY:
        return _with_buffers(value, head, body, buffers, segments)
    return body


def _are_plain(values: Sequence[Any]) -> bool:
    if len(values) > _FEW:
        return False
    for value in values:  # noqa: SIM110 - a generator takes three times as long
        if type(value) not in _PLAIN:
            return False
    return True


def _with_buffers(
    value: Any,
    head: bytes,
    body: bytes,
    buffers: list[pickle.PickleBuffer],
    segments: SegmentPool | None,
    dumps: Callable[..., bytes] = pickle.dumps,
) -> bytes | Parcel:
    """Put the large parts of `value` into a segment; `body` is `head` and its pickle without `buffers`."""

    def pickled(callback: Callback | None) -> bytes:
        return head + dumps(value, protocol=_PROTOCOL, buffer_callback=callback)

    if segments is not None:
        return parcel_of(body, buffers, pickled, segments)
    if any(isinstance(memoryview(buffer).obj, Token) for buffer in buffers):
        raise JobNotPicklable(SHARED_IS_FOR_JOBS)
    return pickled(None)


def _packed_function(fn: Callable[..., Any]) -> bytes:
    name = pickle.dumps(fn, _PROTOCOL)
    packed = _SIZE.pack(len(name)) + name
    if len(_packed) >= _MAX_FUNCTIONS:
        _packed.clear()
    _packed[fn] = packed
    return packed


def _unpacked_function(packed: bytes) -> Callable[..., Any]:
    fn = _unpacked.get(packed)
    if fn is None:
        fn = pickle.loads(packed)
        if len(_unpacked) >= _MAX_FUNCTIONS:
            _unpacked.clear()
        _unpacked[packed] = fn
    return fn


def text_of(error: BaseException, tb: Any) -> str:
    """Return the formatted traceback whatever the error's own methods do."""
    try:
        return "".join(traceback.format_exception(type(error), error, tb))
    except BaseException as reason:  # a __str__ or __cause__ of the user's that raises
        return f"{type_name_of(error)} (its traceback could not be formatted: {type_name_of(reason)})\n"


def _rebuildable(error: BaseException) -> bytes | None:
    """Return the pickled exception if it comes out of pickle as what it was, else None."""
    try:
        packed = pickle.dumps(error, _PROTOCOL)
        return packed if type(pickle.loads(packed)) is type(error) else None
    except BaseException:  # whatever the users' __reduce__ and __init__ raise
        return None


def _pack_closure(
    call: Any, segments: SegmentPool | None, what: str, error: Exception, *, may_inherit: bool = False
) -> bytes | Parcel:
    try:
        import cloudpickle
    except ImportError:
        raise JobNotPicklable(
            f"{what} cannot be pickled: {message_of(error)}. Functions must be importable by name; for lambdas "
            "and closures install the extra: pip install 'bulkhead-pool[closures]'"
        ) from error

    try:
        buffers: list[pickle.PickleBuffer] = []
        dumps = partial(heritage.dumps, kind=cloudpickle.Pickler) if may_inherit else cloudpickle.dumps
        body = _NO_FUNCTION + dumps(call, protocol=_PROTOCOL, buffer_callback=buffers.append)
        return _with_buffers(call, _NO_FUNCTION, body, buffers, segments, dumps)
    except JobNotPicklable:
        raise
    except Exception as second:
        raise JobNotPicklable(
            f"{what} cannot be pickled, not even by cloudpickle: {message_of(second)}"
        ) from second


def _cloudpickled(value: Any) -> bytes | None:
    try:
        import cloudpickle

        return cloudpickle.dumps(value, protocol=_PROTOCOL)  # type: ignore[no-any-return]
    except Exception:
        return None
