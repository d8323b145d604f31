"""Every store keeps the promises of its port; each is also tried where it may break."""
