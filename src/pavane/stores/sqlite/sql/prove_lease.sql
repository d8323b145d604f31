-- The fence: prolongs the node's lease inside the batch; no row changed means it is lost. Takeover
-- deletes the row first, under the same single writer's lock.
UPDATE nodes
SET expires_us = CAST(unixepoch('subsec') * 1000000 AS INTEGER) + ?3
WHERE no = ?1 AND nonce = ?2
