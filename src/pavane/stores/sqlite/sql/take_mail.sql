-- Remove delivered mail; id '*' removes all of a run. Index: mailbox_by_run.
DELETE FROM mailbox WHERE service = ?1 AND run = ?2 AND (id = ?3 OR ?3 = '*')
