-- Append a chunk of a journal. Index: journal_by_run is the second fence: no entry is written twice.
INSERT INTO journal (run, seq, body)
VALUES (?, ?, ?)
