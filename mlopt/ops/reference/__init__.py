"""Plain-torch twins of the native ops: same names, same semantics, no extension. The tests compare against these."""
