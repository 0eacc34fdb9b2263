"""`bulkhead worker module:app`: run an application's jobs."""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from bulkhead.errors import BrokerUnavailable, BulkheadError

if TYPE_CHECKING:
    from bulkhead.service.app import App

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

__all__ = ["add_to"]

# Exit codes, besides 0 for a worker that was told to stop and 2 for arguments that cannot be understood.
_FAILED = 1
_UNAVAILABLE = 69  # EX_UNAVAILABLE of sysexits.h: the broker cannot be reached


def add_to(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "worker",
        help="run the jobs of an application's queues",
        description="Run the jobs of an application's queues until SIGTERM, SIGHUP or Ctrl-C. Then jobs that run have "
        "the grace time to end and are given back otherwise; a second signal gives them back at once.",
    )
    parser.add_argument(
        "app", metavar="MODULE:APP", help="the module, importable from here, and the App in it"
    )
    parser.add_argument(
        "--queues", metavar="Q,Q", help="names of the queues (default: all of the application's)"
    )
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="SECONDS", help="for jobs that run (default: 30)"
    )
    parser.add_argument(
        "--once", action="store_true", help="run one job of the first queue that has one due, then end"
    )
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="default: info"
    )
    parser.set_defaults(run=_run)


def _run(options: Any) -> None:
    # Why: while there is no worker yet that could stop in good order, or only one job runs.
    signal.signal(signal.SIGTERM, _exit)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:  # not so under nohup
        signal.signal(signal.SIGHUP, _exit)
    try:
        _work(options)
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


def _exit(number: int, _: object) -> NoReturn:
    sys.exit(128 + number)


def _work(options: Any) -> None:
    logging.basicConfig(
        level=options.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    app = _imported(options.app)
    queues = None if options.queues is None else [part.strip() for part in options.queues.split(",")]
    try:
        if options.once:
            _run_one(app, queues)
        else:
            app.run(queues, grace=options.grace)
    except BrokerUnavailable as error:
        _give_up(str(error), _UNAVAILABLE)
    except BulkheadError as error:
        _give_up(str(error), _FAILED)
    finally:
        app.close()


def _run_one(app: App, queues: list[str] | None) -> None:
    for queue in queues or app.queue_names():
        job = app.run_once(queue)
        if job is not None:
            print(f"{job.id} {job.state}")  # noqa: T201 - what the command is asked for
            return


def _imported(text: str) -> App:
    module_name, colon, attribute = text.partition(":")
    if not colon or not module_name or module_name.startswith(".") or not attribute:
        _give_up(f"{text!r} is not MODULE:APP, such as jobs:app", 2)
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there; it imports something that is not
        _give_up(f"there is no module {module_name!r} on the path or in {here}", 2)
    for part in attribute.split("."):
        found = getattr(found, part, None)
    from bulkhead.service.app import App

    if not isinstance(found, App):
        _give_up(f"{attribute!r} of module {module_name!r} is no App but {found!r}", 2)
    return found


def _give_up(message: str, code: int) -> NoReturn:
    print(f"bulkhead worker: {message}", file=sys.stderr)  # noqa: T201 - the command's own words
    raise SystemExit(code)
