"""What can be known of processes by looking at them: values that a terminal or a page can draw."""
