"""The worker wing: it claims tasks, runs their handlers and settles them. It imports nothing of the client wing.

worker.py is the pipe; it starts and stops the others, in order:

    claim, doorbell, cursors, capacity, admission, left_out    what to take, and when
    runners, batch, large_payloads, transaction, predecessors  one task, or many, while it runs
    outcome, backoff                                           how a task ended: decided
    settle, unwritten, outcome_writer                          and written down
    heartbeat, loop_watch, silence                             alive; is its own loop, are other workers?
    maintenance, crons, server_clock                           the chores: rescue, prune, crons
    signals                                                    SIGTERM and its kin
"""
