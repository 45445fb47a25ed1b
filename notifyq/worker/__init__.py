"""The worker wing: it claims tasks, runs their handlers and settles them. It imports nothing of the client wing.

worker.py starts and stops the stages, in order. pipe.py has what each stage tells it.

    claim, decide, drain, state, moderation
                                            the loop that claims, and the tables that decide what it does next
    listen, doorbell                        how it hears of new tasks
    intake, capacity, slots, job, cursors   what it claims, and how much
    admission, due, isolate, last_check,
    left_out, waiting                       what else it does on its connection
    runners, group, handler_run, attempt,
    calls, batch                            tasks while they run, one by one or in batches
    services, large_payloads, transaction,
    predecessors                            what a running task uses of the database
    outcome, backoff, outcome_log           how an attempt ended: decided, and logged
    settle, unwritten, outcome_writer       the same, written into the database
    outages                                 what a stage does while it has no database
    heartbeat, loop_watch, silence          whether this worker, its event loop and other workers live
    maintenance, crons, server_clock        the chores: rescue, prune, crons
    unreachable                             what its settings keep it from, logged at its start
    signals                                 SIGTERM and SIGINT
"""
