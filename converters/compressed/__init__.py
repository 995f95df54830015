"""compressed-tensors folders, for vLLM, SGLang and transformers."""
