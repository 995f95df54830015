"""Byte-level BPE tokenizers: the pre-tokenizer as an explicit regex spec, and the proof that ids agree."""
