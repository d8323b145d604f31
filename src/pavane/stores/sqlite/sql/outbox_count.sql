-- Count the event that the statement before appended, if it did. Index: primary key.
INSERT INTO main.event_types (type, version, count)
SELECT ?, ?, 1 WHERE changes() > 0
ON CONFLICT (type, version) DO UPDATE SET count = count + excluded.count
