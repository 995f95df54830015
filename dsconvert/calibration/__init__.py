"""Which windows a quantizer sees, and the record of it."""
