"""The worker wing: it claims tasks, runs their handlers and settles them. It imports nothing of the client wing.

worker.py is the pipe; it starts and stops the others, in order:

    claim, decide, state, moderation, doorbell, listen         when to claim: the loop, its table, the bell
    intake, capacity, cursors, admission, due, isolate,
    left_out, waiting                                          what to claim, and what else the loop does
    runners, batch, large_payloads, transaction, predecessors  one task, or many, while it runs
    outcome, backoff                                           how a task ended: decided
    settle, unwritten, outcome_writer                          and written down
    heartbeat, loop_watch, silence                             alive; is its own loop, are other workers?
    maintenance, crons, server_clock                           the chores: rescue, prune, crons
    signals                                                    SIGTERM and its kin
"""
