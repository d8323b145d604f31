"""Tests with real processes, files and clocks."""
