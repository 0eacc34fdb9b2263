"""The engine on OS processes. Data flow of one pool:

    caller's threads                 ProcessPool                        launcher (one process per pool)
    dispatch, barrier, … ──▶ Scheduler (kernel) decides                   ▲ start, end │ started, gone
                             instructions are carried out ── LauncherLink ┴────────────┘   │ fork, kill, reap
                                   │ job frames (one pipe per worker)                      ▼
                                   └──────────────────────────────────▶ worker: read, unpickle, run, pickle, write
                             Driving: whoever waits, polls ◀── result frames (one pipe per worker) ──┘

| file | problem it answers |
|---|---|
| pool.py | carrying out the kernel's instructions; what a death means |
| driving.py | which thread polls, who waits, who takes over |
| interrupts.py | keeping a Ctrl-C out of the middle of a change |
| channel.py | bytes through a pipe without being held up |
| payload.py | pickling both ways |
| callbacks.py | running users' done callbacks |
| deaths.py | what is told of a worker's end |
| poller.py | waiting for descriptors |
| worker.py | the caller's handle on one worker process |
| worker_main.py | what runs in a worker |
| launcher.py, launcher_link.py | starting, ending and reaping workers; the two ends of that conversation |
| blackbox.py | what a dead worker leaves behind for the report |
| lifeline.py | no worker outlives its caller |
| main_module.py | giving workers the caller's `__main__` |
"""
