-- Count events of a type and version in (or, negative, out). Index: primary key.
INSERT INTO event_types (type, version, count)
VALUES (?, ?, ?)
ON CONFLICT (type, version) DO UPDATE SET count = count + excluded.count
