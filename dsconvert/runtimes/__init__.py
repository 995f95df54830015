"""Real runtimes, optional: each module drives one of them."""
