"""Runs a decoder block by block, and what is measured on the way."""
