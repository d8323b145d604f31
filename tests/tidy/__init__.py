"""What holds the house in order: rules that a reader relies on and a reviewer forgets."""
