-- Let in tasks that waited for the slots and ends recorded in notifyq.freed. Returns how many.
SELECT notifyq.free() AS ready
