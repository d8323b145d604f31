-- End the custody of an event. Index: primary key.
DELETE FROM parked_events WHERE handler = ? AND pos = ?
