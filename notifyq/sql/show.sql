-- For people: all that is known of task $1, as JSON. json, unlike jsonb, keeps the order of its keys.
SELECT to_json(t)::text FROM notifyq.all_tasks AS t WHERE id = $1
