-- Forget what a run waits for; id '*' forgets all of the run's. Index: primary key.
DELETE FROM awaits WHERE run = ?1 AND (id = ?2 OR ?2 = '*')
