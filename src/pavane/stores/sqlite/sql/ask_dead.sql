-- Note what was asked for a dead letter, so that it is not asked twice. Index: primary key.
UPDATE dead_letters SET asked = ?2 WHERE no = ?1
