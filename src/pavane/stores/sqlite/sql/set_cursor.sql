-- Move a handler's position in a slot; never back. Index: primary key.
UPDATE cursors SET position = ?3 WHERE handler = ?1 AND slot = ?2 AND position < ?3
