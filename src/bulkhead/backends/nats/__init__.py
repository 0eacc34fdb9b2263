"""Jobs in NATS JetStream.

JetStream has streams of messages, consumers that give messages out and wait for an acknowledgement, and a
compare-and-set on the last message of a subject. It has no job: no lookup or deletion by id, no priorities, no delay
on publishing (before 2.12), no dead letters, and no fencing: an acknowledgement of somebody whose time is over is
taken, even if the message is somebody else's by now. So the work is divided:

- **A record decides.** Each job has one message in `<ns>-jobs`, changed by compare-and-set only: where the job is,
  which attempt holds it (its token) and until when. A late worker's ack fails on its token. (`job`, `cells`, `jobs`)
- **A ticket leads there.** The work-queue stream `<ns>-ready` has a ticket for each job that can be claimed, given out
  by a durable pull consumer for each queue and priority. It is hidden while the job runs, as long as the lease holds,
  comes back when the lease is over, and is acknowledged when the job is settled. (`tickets`, `claiming`)
- **What is not due yet** has its ticket in `<ns>-index`, in whose subjects the times stand, and is moved when due.
- **Order of steps.** Whoever dies between two of them leaves a ticket too many, never one too few; the table in `jobs`
  has every case. A ticket too many costs one look.

Records are not deleted when a job is settled: a last value says so, and is swept away minutes later. JetStream writes
deletions down late, and a server killed in between would bring settled jobs back to life. (`cells`)

Instants are the server's (`clock`). Names of any characters become tokens (`names`). Outcomes and the registry are KV
buckets (`results`, `registry`). Each process has a thread with the event loop of nats-py (`link`, `looping`,
`session`). Lists and counts have a price (`looking`).

Promised less than elsewhere: a call that enqueues many is not atomic. Order by due time is kept as far as tickets
are put in that order: with several claimers, or where nobody claims when a job becomes due, one enqueued in that time
may come before it; likewise a job whose lease ran out comes first. A job that is given back for a while comes behind
those that were put in meanwhile (`Return.keeps_place`).

The URL: `nats://[user:password@|token@]host[:4222][,host…]`, or `tls://`; options `replicas` (1 to 5), `storage`
(file, memory), `timeout` (seconds until a silent server counts as gone, default 4), `creds_file` and
`ca_file`.

Files, from the top: `link` (the contracts, a process's connection), `jobs` (the broker's steps), `claiming`, `looking`,
`queues`, `tickets`, `bells`, `results`, `registry`; `cells` (a stream as a table), `pulling`, `clock`, `layout`,
`session` (questions and answers), `looping`; values: `job`, `packing`, `names`, `options`.

Written for server 2.9 and later; tested with 2.9.10.
"""

from __future__ import annotations

from bulkhead.backends.base import Backend
from bulkhead.backends.nats.link import Link, NatsBroker, NatsRegistry, NatsResultStore
from bulkhead.backends.nats.options import read
from bulkhead.backends.nats.session import AccessRefused
from bulkhead.errors import ConfigError

__all__ = ["connect"]


def connect(url: str, namespace: str = "bulkhead") -> Backend:
    """Return a backend on JetStream; its streams are made if they are missing.

    Raises:
        ConfigError: The URL has an option that is unknown or has a bad value, or the server refuses the credentials.
        BrokerUnavailable: No server answers there, or it has no JetStream.
    """
    link = Link(read(url, namespace))
    try:
        link.call(lambda at: at.clock.keep_right())
    except AccessRefused as error:
        link.close()
        raise ConfigError(str(error)) from error
    except BaseException:
        link.close()
        raise
    return Backend(NatsBroker(link), NatsResultStore(link), NatsRegistry(link))
