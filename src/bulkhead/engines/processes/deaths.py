"""What it means when a worker was ended or ended itself: for its job, and in words and attributes of the error."""

from __future__ import annotations

import signal

from bulkhead._kernel.records import JobRecord, Loss, SlotState, Verdict
from bulkhead.chunk import Chunk
from bulkhead.engines.processes import chunks
from bulkhead.engines.processes.launcher import Report
from bulkhead.engines.processes.use import mib
from bulkhead.engines.processes.worker import Worker
from bulkhead.errors import (
    JobTimeout,
    MemoryLimitExceeded,
    PoolBroken,
    StartDeadlineExceeded,
    WorkerCrashed,
)
from bulkhead.validate import shown

__all__ = ["UNKNOWN", "crash", "excess", "expiry", "meaning", "timeout"]

UNKNOWN = Report(None, None, 0, "", "", None, False)

_OUTPUT_LINES = 20

# The innermost functions of ours that call a job or an item.
_OUR_FRAMES = (
    " in _attempt",
    " in _run_plain",
    " in _run_starred",
    " in _run_carefully",
    " in _run_plain_quickly",
    " in _run_starred_quickly",
)


def meaning(worker: Worker, report: Report, label: str) -> tuple[Loss, BaseException]:
    """Return what a worker's end means for its job, and the error for the kernel. Once, and before it is closed.

    Args:
        worker: What it answered before has been told.
        report: How it ended.
        label: Of its pool.
    """
    slot = worker.slot
    job = slot.job
    if slot.state is SlotState.STARTING:
        error = _start_failure(worker, report, label)
    elif job is not None and slot.verdict is Verdict.TIMEOUT:
        error = timeout(_at(worker, job), job.timeout, worker.pid, report)
    elif job is not None and slot.verdict is Verdict.MEMORY:
        error = excess(_at(worker, job), worker, report)
    elif job is not None:
        error = worker.failure or crash(worker.pid, report, f"running {_at(worker, job)}")
    else:
        error = crash(worker.pid, report, "idle")
    loss = Loss.ATTEMPT if report.last_read == worker.message else Loss.UNREAD
    if isinstance(job, Chunk) and loss is Loss.ATTEMPT and slot.verdict is not Verdict.CANCEL:
        return chunks.lost(worker, job, error)
    return loss, error


def crash(pid: int | None, report: Report, doing: str) -> WorkerCrashed:
    """Return the error for a worker that ended without an answer.

    Args:
        pid: The process.
        report: How it ended.
        doing: What it was at, such as "running job 7".
    """
    name = _signal_name(report.signal)
    stack = _without_our_frames(report.stack)
    output = _last_lines(report.output)
    parts = [f"worker process {pid} {_how(report, name)} while {doing}"]
    if report.out_of_memory:
        parts.append("the kernel's out-of-memory killer is the likely cause")
    if report.peak_rss_bytes is not None:
        parts.append(f"peak memory {report.peak_rss_bytes / 2**20:.1f} MiB")
    text = "; ".join(parts)
    if stack:
        text += f"\n{stack}"
    if output:
        text += f"\nlast output:\n{output}"
    return WorkerCrashed(
        text,
        pid=pid,
        signal=name,
        exit_code=report.exit_code,
        stack=stack,
        peak_rss_bytes=report.peak_rss_bytes,
        out_of_memory=report.out_of_memory,
        output=output,
    )


def timeout(what: str, limit: float | None, pid: int | None, report: Report) -> JobTimeout:
    """Return the error for a job that was ended because it ran too long.

    Args:
        what: The job or the item of a map.
        limit: Seconds it was allowed.
        pid: The process.
        report: How that ended.
    """
    stack = _without_our_frames(report.stack)
    text = f"{what} ran longer than {limit} s; worker process {pid} was ended with all it had started"
    if stack:
        text += f"\n{stack}"
    return JobTimeout(text, timeout=limit, pid=pid, stack=stack)


def excess(what: str, worker: Worker, report: Report) -> MemoryLimitExceeded:
    """Return the error for a job that was ended because it took too much memory.

    Args:
        what: The job or the item of a map.
        worker: Its worker, whose `excess` is known.
        report: How that ended.
    """
    assert worker.excess is not None
    taken, limit = worker.excess
    name = _signal_name(report.signal)
    stack = _without_our_frames(report.stack)
    text = (
        f"{what} took {mib(taken)} in worker process {worker.pid}, more than hard_memory_limit={limit} ({mib(limit)}); "
        "the process was ended with all it had started. Let the job take less or raise the limit; should memory have "
        "piled up over many jobs, let max_memory_per_worker or max_jobs_per_worker replace workers before"
    )
    if stack:
        text += f"\n{stack}"
    return MemoryLimitExceeded(
        text,
        pid=worker.pid,
        signal=name,
        exit_code=report.exit_code,
        stack=stack,
        peak_rss_bytes=report.peak_rss_bytes,
        output=_last_lines(report.output),
        rss_bytes=taken,
        limit_bytes=limit,
    )


def expiry(job: JobRecord) -> StartDeadlineExceeded:
    """Return the error for a job that was not started in time."""
    return StartDeadlineExceeded(f"job {shown(job.id)} did not start before its deadline and was not run")


def _start_failure(worker: Worker, report: Report, label: str) -> BaseException:
    cause = worker.failure or crash(worker.pid, report, "getting ready")
    error = PoolBroken(f"{label} is given up, its workers do not come up: {cause}")
    error.__cause__ = cause
    return error


def _at(worker: Worker, job: JobRecord) -> str:
    """Return what a worker's job is called in an error."""
    return chunks.title(worker, job) if isinstance(job, Chunk) else f"job {shown(job.id)}"


def _how(report: Report, name: str | None) -> str:
    if name is not None:
        return f"was ended by {name}"
    if report.exit_code is not None:
        return f"exited with code {report.exit_code}"
    return "ended in a way that could not be learned"


def _signal_name(number: int | None) -> str | None:
    if number is None:
        return None
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_lines(output: str) -> str:
    return "\n".join(output.splitlines()[-_OUTPUT_LINES:])


def _without_our_frames(stack: str) -> str:
    """Drop the frames between the job's own and the worker's start, which tell the user nothing."""
    kept = []
    is_ours = False
    for line in stack.rstrip().splitlines():
        is_frame = line.startswith("  File ")
        is_ours = is_frame and (is_ours or line.endswith(_OUR_FRAMES))
        if not is_ours:
            kept.append(line)
    return "\n".join(kept)
