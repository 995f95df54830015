"""A proof's result as tables and as a page."""
