-- For how long a node prolongs its lease while it works. One that rests prolongs it for longer, until
-- somebody calls it. Nodes of the version before do not rest.
ALTER TABLE pavane.nodes ADD COLUMN lease_us bigint;
