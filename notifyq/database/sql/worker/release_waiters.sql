-- Let in tasks that waited for the slots and ends recorded in the first $1 rows of notifyq.slot_released. Returns how many.
SELECT notifyq.release_waiters($1::integer) AS ready
