-- For people: all that is known of task $1, as JSON. json, unlike jsonb, keeps the order of its keys.
SELECT to_json(t)::text FROM notifyq.all_tasks AS t WHERE id = $1
-- An older task may have had the same id: see read_highest_ids.sql.
ORDER BY state IN ('done', 'dead', 'cancelled') LIMIT 1
