"""Networks written to files that others read."""
