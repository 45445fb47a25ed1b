-- Release tasks that wait for the slots and ends recorded in the first $1 rows of notifyq.slot_released. Returns how
-- many are ready, or scheduled for the time of a rate.
SELECT notifyq.release_waiters($1::integer) AS ready
