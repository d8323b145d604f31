-- Forget waits from before ?1 that were given an event which has left the log, at most ?2: as long as
-- it is there, a run that asks again gets the same one. Index: awaits_given.
DELETE FROM awaits WHERE (run, id) IN (
    SELECT run, id FROM awaits
    WHERE pos > 0 AND at_us < ?1 AND NOT EXISTS (SELECT 1 FROM events WHERE events.pos = awaits.pos)
    LIMIT ?2
)
