"""How much memory a model takes when it runs: computed by a formula, and measured."""
