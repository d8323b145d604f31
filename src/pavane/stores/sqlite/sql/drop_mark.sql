-- Forget that message ?1 was consumed, by ?2 or by all that got an event, once it left the log. While
-- its run ?3 goes on the mark stays: it tells where a baton went. Index: primary key, runs_by_id.
DELETE FROM inbox
WHERE id = ?1 AND (service = ?2 OR ?2 = '')
AND NOT EXISTS (
    SELECT 1 FROM runs WHERE runs.id = ?3 AND runs.service = runs.home AND runs.ended_us IS NULL
)
