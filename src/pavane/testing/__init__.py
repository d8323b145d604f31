"""What users and authors of stores test with."""
