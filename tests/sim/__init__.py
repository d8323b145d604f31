"""The engine in simulated storms, and the proof that they find mistakes."""
