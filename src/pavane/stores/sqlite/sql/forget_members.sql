-- Forget that a run belonged to conversations, once it is pruned. Index: members_by_run.
DELETE FROM members WHERE run = ?
