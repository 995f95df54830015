"""EXL2: packing, scale search, settings and their allocation, shape rules, the folder's reader."""
