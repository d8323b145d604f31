-- End the custody of a step. Index: primary key.
DELETE FROM parked WHERE service = ? AND id = ?
