-- For people: queues, a row each as JSON.
SELECT to_json(q)::text AS queue FROM notifyq.all_queues q ORDER BY q.name
