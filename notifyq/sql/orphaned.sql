-- Is there anything for orphans.sql? Asked first, since its UPDATE rings even for no row.
SELECT EXISTS (
    SELECT
    FROM notifyq.task t
    WHERE t.worker IS NOT NULL AND NOT EXISTS (SELECT FROM notifyq.worker w WHERE w.id = t.worker)
      AND NOT row_security_active('notifyq.worker'))
