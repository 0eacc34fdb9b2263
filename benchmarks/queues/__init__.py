"""The queues that bench_queue.py compares, a module for each.

A module has the task `noop(a, b)`, which returns their sum; the task `late(sent)`, which puts into the Redis list
"latencies" how long ago that was; and the functions

    WORKERS             the command lines of its workers, for two processes that run jobs
    enqueue(n)          enqueue n no-ops in the quickest way the library has
    enqueue_late()      enqueue one `late`
    n_left(n)           how many of n no-ops have no result yet
"""
