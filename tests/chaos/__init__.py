"""Chaos: real workers and enqueuers, faults at random, and a checker that reads the whole history afterwards.

    python -m tests.chaos --minutes 5 --seed 7     or: make chaos MINUTES=5 SEED=7

app, worker      what the worker processes run; each handler's beginning and end is a line in a file
ledger           triggers on notifyq's tables: every transition of every row, with the database's clock
producers        enqueuers of all kinds, which write down what they know to be committed
fleet            the worker processes, each with a role of its own in the database
faults           the list of what is done to them
stage            what the faults act on
play             one run: all of that together, until the last task has ended
history          what was recorded, read into one place
checker, flow, once, timing  the promises, proven from the history or not
report           the table, and the story of a task that a promise was broken for
mutants          notifyq broken on purpose, to see that the checker can fail

All clocks are this machine's, so times from the database and from the workers can be compared.
"""
