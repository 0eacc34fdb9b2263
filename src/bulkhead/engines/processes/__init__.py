"""The engine on OS processes. Data flow of one pool:

    caller's threads                 ProcessPool                        launcher (one process per pool)
    dispatch, barrier, … ──▶ Scheduler (kernel) decides                   ▲ start, end │ started, gone
                             Acting carries it out ── Staff, LauncherLink ┴────────────┘   │ fork, kill, reap
                                   │ job frames (one pipe per worker)                      ▼
                                   └──────────────────────────────────▶ worker: read, unpickle, run, pickle, write
                             Driving: whoever waits, polls ◀── result frames (one pipe per worker) ──┘

| file | problem it answers |
|---|---|
| pool.py | what a dispatcher asks of a pool; how callers wait; how a pool ends |
| acting.py | carrying out the kernel's instructions; what one turn of the driver does; ruin |
| staff.py | which workers there are, who should be gone, what follows when a launcher dies |
| reading.py, answers.py | what comes through the pipes; what the frames of workers say, and the kernel is told |
| chunks.py | parts, losses and time limits of a map's chunks |
| settling.py | waking whoever waits for a job, a phase or the last job |
| tidying.py | giving back memory that nobody needs |
| snapshot.py | the counters of one moment |
| chronicle.py | what is remembered of attempts and workers |
| driving.py | which thread polls, who waits, who takes over |
| interrupts.py | keeping a Ctrl-C out of the middle of a change |
| channel.py | bytes through a pipe without being held up |
| payload.py | pickling both ways |
| heritage.py | what of multiprocessing only new processes inherit, for initializers |
| callbacks.py | running users' done callbacks |
| deaths.py | what a worker's end means for its job, and what is told of it |
| poller.py | waiting for descriptors |
| worker.py | the caller's handle on one worker process |
| worker_main.py | what runs in a worker |
| launcher.py, launcher_link.py | starting, ending and reaping workers; the two ends of that conversation |
| blackbox.py | what a dead worker leaves behind for the report |
| output.py, output_sources.py | what jobs print and log: whose it is, and that it is out before the result |
| outlet.py | writing it to the caller's streams and loggers |
| stdio.py | the standard streams of a worker whose output is captured |
| log_records.py | log records under way |
| lifeline.py | no worker outlives its caller |
| main_module.py | giving workers the caller's `__main__` |
"""
