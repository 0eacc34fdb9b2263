"""The public names are there for whoever asks, whenever; what they are found in is imported when they are."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from scripts import environment

import bulkhead


def output_of(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, env=environment()
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def test_star_import_and_dir_know_every_public_name() -> None:
    assert (
        output_of(
            "import bulkhead; before = set(dir(bulkhead)); from bulkhead import *\n"
            "print([name for name in bulkhead.__all__ if name not in before or name not in globals()])"
        )
        == "[]\n"
    )


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Dispatchre'"):
        bulkhead.Dispatchre  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'Dispatchre'"):
        from bulkhead import Dispatchre  # noqa: F401


def test_a_public_name_is_the_thing_itself_each_time() -> None:
    for name in bulkhead.__all__:
        found = getattr(bulkhead, name)
        assert getattr(sys.modules[found.__module__], found.__name__) is found
        assert pickle.loads(pickle.dumps(found)) is found


ASKED_AT_ONCE = """
import sys, threading
import bulkhead
sys.setswitchinterval(1e-5)
names = sorted(set(bulkhead.__all__) - {*vars(bulkhead)})
assert "Dispatcher" in names and "App" in names
start = threading.Barrier(8)
found = [[] for _ in range(8)]
def ask(k):
    start.wait()
    for name in names[k:] + names[:k]:
        found[k].append((name, id(getattr(bulkhead, name))))
threads = [threading.Thread(target=ask, args=(k,)) for k in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len({*sum(found, [])}) == len(names))
"""


def test_threads_that_ask_at_once_find_the_same() -> None:
    assert output_of(ASKED_AT_ONCE) == "True\n"


# The importing thread is held in the middle of an import, by a module of the caller that the import comes upon.
HELD = """
import os, sys, threading, types
is_in, may_go_on = threading.Event(), threading.Event()
class Holding:
    def find_spec(self, name, path=None, target=None):
        if name == "bulkhead.feeding" and not is_in.is_set():
            is_in.set()
            meanwhile()
def meanwhile():
    may_go_on.wait()
import bulkhead
sys.meta_path.insert(0, Holding())
"""

# From 3.12 on Python warns of what is tried here.
FORKED = (
    HELD
    + """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)
thread = threading.Thread(target=lambda: bulkhead.Dispatcher)
thread.start()
is_in.wait()
threading.Timer(0.05, may_go_on.set).start()
pid = os.fork()
if pid == 0:
    os._exit(7 if bulkhead.Dispatcher.__name__ == "Dispatcher" else 1)
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
)


def test_a_copy_forked_while_a_thread_imports_finds_every_name() -> None:
    assert output_of(FORKED) == "7\n"


INTERRUPTED = (
    HELD
    + """
import signal
asked = []
def handler(*_):
    for name in ("JobTimeout", "Pool", "Dispatcher"):
        try:
            asked.append(getattr(bulkhead, name).__name__)
        except AttributeError as error:
            asked.append(str(error))
signal.signal(signal.SIGUSR1, handler)
bulkhead.Pool
def meanwhile():
    os.kill(os.getpid(), signal.SIGUSR1)
bulkhead.Dispatcher
os.kill(os.getpid(), signal.SIGUSR1)
print(*asked, sep=chr(10))
"""
)


def test_a_signal_handler_gets_a_name_or_is_told_that_its_import_was_interrupted() -> None:
    assert output_of(INTERRUPTED).splitlines() == [
        *["JobTimeout", "Pool"],
        "bulkhead.Dispatcher is just being imported by what this code has interrupted: import it before",
        *["JobTimeout", "Pool", "Dispatcher"],
    ]


CTRL_C = (
    HELD
    + """
def meanwhile():
    raise KeyboardInterrupt
try:
    bulkhead.Dispatcher
except KeyboardInterrupt:
    print(bulkhead.Dispatcher.__name__)
"""
)


def test_an_import_that_ctrl_c_ends_can_be_made_again() -> None:
    assert output_of(CTRL_C) == "Dispatcher\n"
