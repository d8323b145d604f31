"""Watching processes: nothing here changes what they do."""
