"""A shop of four services in processes of their own; `make demo` runs it and kills some of them."""
