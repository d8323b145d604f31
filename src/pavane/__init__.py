"""Pavane: durable workflows, orchestrated or choreographed, from the same code."""
