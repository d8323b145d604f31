"""Tests of single parts, in memory, without an engine."""
