-- Where somebody publishes all tables of the database (`FOR ALL TABLES`, for a logical replica, say),
-- rows without a primary key can be written only if the log tells them whole. These are one row each.
ALTER TABLE pavane.heads REPLICA IDENTITY FULL;
ALTER TABLE pavane.past REPLICA IDENTITY FULL;
