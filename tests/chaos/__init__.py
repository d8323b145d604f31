"""Chaos with real processes: nodes that are killed, frozen and cut off while a shop is busy."""
