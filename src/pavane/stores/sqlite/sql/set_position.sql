-- Move a partition's consumed position; never back. Index: primary key.
UPDATE partitions SET position = ?2 WHERE target = ?1 AND position < ?2
