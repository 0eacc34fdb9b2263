"""The streams of a namespace, and how they are made.

| stream | subjects | keeps |
|---|---|---|
| `<ns>-jobs` | `<ns>.jobs.<id>` | a job's record, one message each; the last one counts |
| `<ns>-ready` | `<ns>.ready.<queue>.<priority>.<id>.<turn>` | tickets: a work queue, each acknowledged once |
| `<ns>-index` | `<ns>.later.<queue>.<due>-<rank>.<priority>.<id>.<turn>` | tickets that are not due yet |
| | `<ns>.dead.<queue>.<buried>.<id>.<turn>` | the list of dead letters |
| | `<ns>.queues.<queue>` | a queue's name, priorities and pause |
| | `<ns>.clock` | a stamp of the server |
| `KV_<ns>-results` | `$KV.<ns>-results.<id>` | outcomes, a KV bucket |
| `KV_<ns>-registry` | `$KV.<ns>-registry.<key>` | the registry, a KV bucket |

Instants in subjects are microseconds. `<ns>.bell.<queue>` is no stream's: a message there wakes those who wait.
"""

from __future__ import annotations

import json
from typing import Any

from bulkhead.backends.nats.options import Options
from bulkhead.backends.nats.session import Answer, Question, Session
from bulkhead.errors import BrokerUnavailable, ConfigError

__all__ = ["Layout", "check_answer"]

# Codes of errors: a stream of this name has another configuration; another stream has such subjects.
_ALREADY_THERE = 10058
_OVERLAP = 10065

# What is published for another stream than the one that has the subject is refused by that: so it is known to be there.
_PROBE = {"Nats-Expected-Stream": "none"}


class Layout:
    """Names of streams and subjects of one namespace."""

    def __init__(self, options: Options) -> None:
        root = options.namespace
        self.options = options
        self.jobs_stream = f"{root}-jobs"
        self.ready_stream = f"{root}-ready"
        self.index_stream = f"{root}-index"
        self.results_stream = f"KV_{root}-results"
        self.registry_stream = f"KV_{root}-registry"
        self.jobs = f"{root}.jobs"
        self.ready = f"{root}.ready"
        self.later = f"{root}.later"
        self.dead = f"{root}.dead"
        self.queues = f"{root}.queues"
        self.clock = f"{root}.clock"
        self.bell = f"{root}.bell"
        self.results = f"$KV.{root}-results"
        self.registry = f"$KV.{root}-registry"

    async def make_streams(self, session: Session) -> None:
        """Make the streams that are missing; those that are there stay as they are.

        Raises:
            ConfigError: It cannot be, for example because another stream has such subjects.
            BrokerUnavailable: JetStream refuses, for example for want of space.
        """
        configs = self._streams()
        answers = await self._created(session, configs)
        # Race: others make the same streams now. A server that looks for the name, and then for the subjects, may meet
        # theirs between the two; asked again it knows the name.
        doubtful = [config for config in configs if _code(answers[config["name"]]) == _OVERLAP]
        answers |= await self._created(session, doubtful)
        for name, answer in answers.items():
            error = answer.get("error")
            if error is None or _code(answer) == _ALREADY_THERE:
                continue
            if error.get("code") == 400:
                raise ConfigError(f"NATS refuses the stream {name}: {error['description']}")
            check_answer(answer, f"making the stream {name}")
        # Race: a stream that others make now is answered for before it is whole, and a server that is asked for a
        # message of it then falls (2.9.10). Its subjects have a listener when it is.
        await session.ask(
            [(f"{config['subjects'][0].rstrip('.*>')}.probe", b"", _PROBE) for config in configs]
        )

    async def _created(self, session: Session, configs: list[dict[str, Any]]) -> dict[str, Answer]:
        """Have these streams made; return what is answered for each name."""
        questions: list[Question] = [
            (f"$JS.API.STREAM.CREATE.{config['name']}", json.dumps(config).encode(), None)
            for config in configs
        ]
        names = [config["name"] for config in configs]
        return dict(zip(names, await session.ask(questions), strict=True))

    def _streams(self) -> list[dict[str, Any]]:
        kept = {"max_msgs_per_subject": 1, "allow_rollup_hdrs": True}
        return [
            self._stream(self.jobs_stream, [f"{self.jobs}.*"], **kept),
            self._stream(
                self.ready_stream,
                [f"{self.ready}.>"],
                retention="workqueue",
                # A second ticket of the same turn is refused.
                max_msgs_per_subject=1,
                discard="new",
                discard_new_per_subject=True,
            ),
            self._stream(
                self.index_stream,
                [f"{self.later}.>", f"{self.dead}.>", f"{self.queues}.*", self.clock],
                **kept,
            ),
            self._stream(
                self.results_stream, [f"{self.results}.>"], allow_direct=True, discard="new", **kept
            ),
            self._stream(
                self.registry_stream, [f"{self.registry}.>"], allow_direct=True, discard="new", **kept
            ),
        ]

    def _stream(self, name: str, subjects: list[str], **more: Any) -> dict[str, Any]:
        return {
            "name": name,
            "subjects": subjects,
            "retention": "limits",
            "discard": "old",
            "storage": self.options.storage,
            "num_replicas": self.options.replicas,
            "max_consumers": -1,
            "max_msgs": -1,
            "max_bytes": -1,
            "max_msg_size": -1,
            "max_age": 0,
            **more,
        }


def _code(answer: Answer) -> int | None:
    code: int | None = answer.get("error", {}).get("err_code")
    return code


def check_answer(answer: Answer, doing: str) -> Answer:
    """Return the answer if it is none of an error.

    Raises:
        BrokerUnavailable: The server could not do it.
    """
    error = answer.get("error")
    if error is not None:
        raise BrokerUnavailable(f"NATS server, {doing}: {error.get('description')} ({error.get('err_code')})")
    return answer
