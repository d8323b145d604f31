-- Remove a dead letter that was handled after all, or dropped. Index: primary key.
DELETE FROM dead_letters WHERE no = ?
