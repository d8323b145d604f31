-- Since when a node is there, and what people ask of it.
ALTER TABLE nodes ADD COLUMN joined_us INTEGER NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN asked TEXT NOT NULL DEFAULT '';
