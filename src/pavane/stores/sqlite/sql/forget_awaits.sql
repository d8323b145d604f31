-- Forget what a pruned run still waited for. What it was given goes with the event, since a run that
-- goes on from it must not get the same one. Index: primary key.
DELETE FROM awaits WHERE run = ? AND pos = 0
