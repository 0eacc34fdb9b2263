"""Pickling both ways, with objects that do their worst."""

from __future__ import annotations

import dataclasses
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import pytest
from parameters import named

from bulkhead import JobNotPicklable, RemoteError
from bulkhead.engines.processes import payload
from bulkhead.engines.processes.payload import (
    pack_call,
    pack_error,
    pack_value,
    unpack_call,
    unpack_error,
    unpack_value,
)
from bulkhead.engines.processes.segments import SegmentPool
from bulkhead.errors import RemoteTraceback


class Buffer(bytearray):
    """Leaves its bytes beside its pickle where it may, as an array does."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return Buffer, (pickle.PickleBuffer(self),)


class Mute(Exception):
    """Has no text to give."""

    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class WrongInit(Exception):
    """Cannot be made from its args."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"{code}: {reason}")


class Refuses:
    """Cannot be pickled."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __reduce__(self) -> NoReturn:
        raise self.error


class Explodes:
    """Can be pickled, but not rebuilt."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __reduce__(self) -> tuple[Any, ...]:
        return explode, (self.kind,)


class OddText(str):
    """A text that cannot be pickled."""

    __slots__ = ()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("not for you")


class Odd(Exception):
    def __str__(self) -> str:
        return OddText("odd words")


class Interrupts(Exception):
    """Raises what is no Exception when it is pickled."""

    def __reduce__(self) -> NoReturn:
        raise KeyboardInterrupt


class Unsettable(Exception):
    """Takes no attribute, not even a cause."""

    __slots__ = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} is read-only")


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    code: int


class Shifty(Exception):
    """Comes out of pickle as something else."""

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, ()


class Once(Exception):
    """Can be rebuilt once, which is in the worker."""

    rebuilt = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return rebuild_once, (self.args,)


class Carries(Exception):
    """Carries facts in attributes."""


class EvilMeta(Exception):
    @property
    def __cause__(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no cause")


def explode(kind: type[BaseException]) -> NoReturn:
    raise kind("cannot be rebuilt")


def rebuild_once(args: tuple[Any, ...]) -> Once:
    Once.rebuilt += 1
    if Once.rebuilt > 1:
        raise Mute
    return Once(*args)


def doubled(number: int) -> int:
    return 2 * number


def nested(depth: int) -> list[Any]:
    made: list[Any] = []
    for _ in range(depth):
        made = [made]
    return made


def raised(error: BaseException) -> BaseException:
    """Return the error with the traceback that it has in a worker: the worker's call, then the job's."""

    def job() -> None:
        raise error

    try:
        job()
    except BaseException as caught:
        return caught


@pytest.fixture
def segments() -> Iterator[SegmentPool]:
    """Where large parts would go; what is packed here is too small for it, but where a test says otherwise."""
    pool = SegmentPool(0)
    yield pool
    pool.close()


@pytest.fixture
def no_cloudpickle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cloudpickle", None)


@pytest.fixture
def cloudpickle() -> Any:
    return pytest.importorskip("cloudpickle")


# Calls


@pytest.mark.parametrize(
    ("fn", "args", "kwargs"),
    [
        (doubled, (), {}),
        (doubled, (4,), {}),
        (doubled, (), {"number": 4}),
        (len, ("abc",), {}),
        (str.upper, ("abc",), {}),
        (dict, (), {"fn": 1, "args": 2, "kwargs": 3}),
        (doubled, tuple(range(50)), {}),
        (doubled, (None, True, 1, 1.5, 2j, "text", b"bytes"), {}),
        (doubled, (None, [True, {1: (2,)}], {3}, bytearray(b"x"), doubled), {"number": [4]}),
        (max, [1, 2, 3], {}),
    ],
    ids=named,
)
def test_a_call_comes_out_as_it_went_in(
    segments: SegmentPool, fn: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    for home in (segments, None, segments):  # from the second time on the function is known
        packed = pack_call(fn, args, kwargs, home)
        assert isinstance(packed, bytes)
        found, found_args, found_kwargs = unpack_call(packed)
        assert found == fn
        assert (found_args, found_kwargs) == (args, kwargs)
        assert list(map(type, found_args)) == list(map(type, args))
    assert not segments.has_files


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_a_call_can_be_unpacked_from_any_buffer(kind: Callable[[bytes], Any]) -> None:
    assert unpack_call(kind(pack_call(doubled, (4,), {}, None))) == (doubled, (4,), {})


@pytest.mark.parametrize("size", [10, 1_000_000])
@pytest.mark.parametrize("kind", [bytes, Buffer], ids=["plain", "with a buffer"])
def test_where_there_are_no_segments_a_call_of_any_size_is_bytes_alone(
    kind: Callable[[bytes], Any], size: int
) -> None:
    """So an initializer's arguments travel."""
    packed = pack_call(doubled, (kind(b"x" * size),), {}, None)
    assert isinstance(packed, bytes)
    found, args, kwargs = unpack_call(packed)
    assert (found, kwargs) == (doubled, {})
    assert bytes(args[0]) == b"x" * size


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_with_cloudpickle_and_without_segments_a_closure_with_a_buffer_is_bytes_alone(
    cloudpickle: Any, size: int
) -> None:
    held = Buffer(b"x" * size)
    packed = pack_call(lambda: held, (), {}, None)
    assert isinstance(packed, bytes)
    fn, args, kwargs = unpack_call(packed)
    assert bytes(fn(*args, **kwargs)) == b"x" * size


def test_later_changes_of_an_argument_do_not_reach_the_job() -> None:
    numbers = [1, 2]
    packed = pack_call(sum, (numbers,), {}, None)
    numbers.append(3)
    assert unpack_call(packed)[1] == ([1, 2],)


def test_functions_are_remembered_in_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "_MAX_FUNCTIONS", 3)
    monkeypatch.setattr(payload, "_packed", {})
    monkeypatch.setattr(payload, "_unpacked", {})
    functions = [doubled, explode, nested, raised, rebuild_once]
    for fn in functions * 2:
        assert unpack_call(pack_call(fn, (), {}, None))[0] is fn
        assert len(payload._packed) <= 3
        assert len(payload._unpacked) <= 3


@pytest.mark.usefixtures("no_cloudpickle")
@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (lambda: 1, ()),
        (doubled, (lambda: 1,)),
        (doubled, (Refuses(TypeError("cannot")),)),
        (doubled, (Refuses(Mute()),)),
        (doubled, (nested(20_000),)),
    ],
    ids=["lambda", "lambda as argument", "refusing argument", "mute refusal", "deep nesting"],
)
def test_a_call_that_cannot_be_pickled_says_so_and_what_to_install(
    segments: SegmentPool, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    with pytest.raises(
        JobNotPicklable, match=r"(?s)job cannot be pickled.*pip install 'bulkhead-pool\[closures\]'"
    ):
        pack_call(fn, args, {}, segments)
    assert not segments.has_files


@pytest.mark.usefixtures("no_cloudpickle")
def test_the_message_names_what_was_to_be_pickled() -> None:
    with pytest.raises(JobNotPicklable, match="initializer cannot be pickled"):
        pack_call(lambda: 1, (), {}, None, "initializer")


def test_with_cloudpickle_a_closure_is_a_job(cloudpickle: Any, segments: SegmentPool) -> None:
    offset = 5
    fn, args, kwargs = unpack_call(pack_call(lambda number: number + offset, (2,), {}, segments))
    assert fn(*args, **kwargs) == 7


@pytest.mark.parametrize("error", [TypeError("cannot"), Mute()], ids=["told", "mute"])
def test_what_not_even_cloudpickle_can_pickle_is_refused(
    cloudpickle: Any, segments: SegmentPool, error: Exception
) -> None:
    with pytest.raises(JobNotPicklable, match="not even by cloudpickle"):
        pack_call(doubled, (Refuses(error),), {}, segments)


def test_an_interrupt_while_a_job_is_pickled_stays_an_interrupt(segments: SegmentPool) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack_call(doubled, (Refuses(KeyboardInterrupt()),), {}, segments)


# Results


@pytest.mark.parametrize(
    "value",
    [None, False, 5, 1.5, 2j, "text", [1, {"a": (2,)}], b"x" * 100_000, [None], doubled],
    ids=lambda v: str(type(v)),
)
def test_a_result_comes_out_as_it_went_in(segments: SegmentPool, value: Any) -> None:
    packed = pack_value(value, segments)
    assert isinstance(packed, bytes)
    for kind in (bytes, bytearray, memoryview):
        found = unpack_value(kind(packed))
        assert found == value
        assert type(found) is type(value)
    assert not segments.has_files


@pytest.mark.usefixtures("no_cloudpickle")
@pytest.mark.parametrize(
    "value", [lambda: 1, Refuses(OSError("cannot")), nested(20_000)], ids=["lambda", "refuses", "deep"]
)
def test_a_result_that_cannot_be_pickled_raises_the_first_reason(segments: SegmentPool, value: Any) -> None:
    with pytest.raises((pickle.PicklingError, AttributeError, OSError, RecursionError)):
        pack_value(value, segments)


def test_with_cloudpickle_a_lambda_is_a_result(cloudpickle: Any, segments: SegmentPool) -> None:
    offset = 5
    assert unpack_value(pack_value(lambda number: number + offset, segments))(2) == 7


def test_a_result_that_cloudpickle_refuses_too_raises_the_first_reason(
    cloudpickle: Any, segments: SegmentPool
) -> None:
    error = OSError("cannot")
    with pytest.raises(OSError, match="cannot") as caught:
        pack_value(Refuses(error), segments)
    assert caught.value is error


# Errors


def test_an_exception_arrives_with_its_type_and_the_remote_traceback() -> None:
    error = Carries("what", 7)
    error.path = "/tmp/x"
    error.add_note("a note")
    found = unpack_error(memoryview(pack_error(raised(error))))
    assert type(found) is Carries
    assert found.args == ("what", 7)
    assert found.path == "/tmp/x"
    assert found.__notes__ == ["a note"]
    assert isinstance(found.__cause__, RemoteTraceback)
    assert "raise error" in found.__cause__.text
    assert "Carries: ('what', 7)\na note" in found.__cause__.text


def test_the_remote_traceback_leaves_the_workers_own_call_out() -> None:
    text = unpack_error(pack_error(raised(ValueError("x")))).__cause__.text
    assert text.count('File "') == 1
    assert "in job" in text


def test_the_remote_traceback_tells_of_causes() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as cause:
            raise ValueError("second") from cause
    except ValueError as error:
        found = unpack_error(pack_error(error))
    assert "KeyError: 'first'" in found.__cause__.text
    assert "direct cause" in found.__cause__.text


def test_a_group_of_exceptions_arrives_as_a_group() -> None:
    found = unpack_error(pack_error(raised(ExceptionGroup("several", [ValueError("a"), KeyError("b")]))))
    assert type(found) is ExceptionGroup
    assert [type(one) for one in found.exceptions] == [ValueError, KeyError]


@pytest.mark.parametrize(
    ("error", "type_name", "message"),
    [
        (WrongInit(7, "no"), "WrongInit", "7: no"),
        (Interrupts("words"), "Interrupts", "words"),
        (Unsettable("words"), "Unsettable", "words"),
        (Frozen(3), "Frozen", "3"),
        (Shifty("words"), "Shifty", "words"),
        (Carries(Refuses(ValueError("cannot"))), "Carries", None),
        (Carries(Explodes(ValueError)), "Carries", None),
        (Carries(Explodes(SystemExit)), "Carries", None),
        (Carries(Explodes(Mute)), "Carries", None),
        (SystemExit(3), "SystemExit", "3"),
        (KeyboardInterrupt(), "KeyboardInterrupt", ""),
        (GeneratorExit("words"), "GeneratorExit", "words"),
        (BaseExceptionGroup("several", [SystemExit(1)]), "BaseExceptionGroup", "several (1 sub-exception)"),
        (type("Local", (Exception,), {})("words"), "Local", "words"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_exception_that_cannot_be_rebuilt_arrives_as_its_text(
    error: BaseException, type_name: str, message: str | None
) -> None:
    found = unpack_error(pack_error(raised(error)))
    assert type(found) is RemoteError
    assert found.type_name == type_name
    assert str(found) == f"{type_name}: {message if message is not None else error}"
    assert isinstance(found.__cause__, RemoteTraceback)
    assert type_name in found.traceback


def test_an_exception_that_can_give_no_text_arrives_with_its_type() -> None:
    found = unpack_error(pack_error(raised(Mute())))
    assert type(found) is Mute
    assert "Mute" in found.__cause__.text


def test_a_text_of_an_odd_type_arrives_as_plain_text() -> None:
    assert str(unpack_error(pack_error(raised(Odd())))) == "odd words"


def test_an_exception_that_can_be_rebuilt_in_the_worker_alone_arrives_as_its_text(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Once, "rebuilt", 0)
    found = unpack_error(pack_error(raised(Once("words"))))
    assert type(found) is RemoteError
    assert str(found) == "Once: words"
    assert "could not be rebuilt in the caller" in found.traceback


def test_a_recursion_error_arrives() -> None:
    def job() -> None:
        job()

    with pytest.raises(RecursionError) as caught:
        job()
    found = unpack_error(pack_error(caught.value))
    assert type(found) is RecursionError
    assert len(found.__cause__.text) < 10_000


def test_an_exception_whose_cause_cannot_be_looked_at_arrives_as_its_text() -> None:
    found = unpack_error(pack_error(raised(EvilMeta("words"))))
    assert "words" in str(found)


def test_an_interrupt_while_an_error_is_rebuilt_stays_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = pack_error(raised(Carries("words")))
    kinds = iter([pickle.loads])

    def loads(body: Any) -> Any:
        return next(kinds, interrupted)(body)

    def interrupted(body: Any) -> NoReturn:
        raise KeyboardInterrupt

    monkeypatch.setattr(payload, "pickle", type("Pickle", (), {"loads": staticmethod(loads)}))
    with pytest.raises(KeyboardInterrupt):
        unpack_error(packed)
