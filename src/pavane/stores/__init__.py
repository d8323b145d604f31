"""Where services keep journals, inboxes, timers and the log."""
