"""GPTQ: solver, packing, shape rules, the checkpoint folder and its reader."""
