"""The pure core: values in, values and operations out; no clock, no I/O."""
