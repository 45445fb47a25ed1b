-- Let those in that waited for what notifyq.freed tells of. Returns how many.
SELECT notifyq.free() AS ready
