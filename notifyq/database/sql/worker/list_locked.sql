-- List those of the tasks $1 whose rows another transaction has locked. It waits for none of them.
WITH free AS MATERIALIZED (
    SELECT t.id FROM notifyq.task t WHERE t.id = ANY ($1::bigint[]) FOR UPDATE SKIP LOCKED
)
SELECT t.id FROM notifyq.task t WHERE t.id = ANY ($1) AND t.id <> ALL (ARRAY(SELECT f.id FROM free f))
