-- Events in a range of positions that nothing refers to. Index: primary key, and the indexes by
-- position of what may refer to them.
SELECT pos, slot, type, version, at_us FROM events
WHERE pos > ? AND pos <= ?
AND NOT EXISTS (SELECT 1 FROM parked_events AS p WHERE p.pos = events.pos)
AND NOT EXISTS (SELECT 1 FROM dead_letters AS d WHERE d.pos = events.pos)
AND NOT EXISTS (SELECT 1 FROM kept_events AS k WHERE k.pos = events.pos)
ORDER BY pos
