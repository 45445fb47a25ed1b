-- What worker $1 runs in the queues $2, of whose limits it has just heard, counts there from now on.
SELECT notifyq.count_running($2::text[], $1::integer)
