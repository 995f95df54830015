"""GGUF: tables of types, quantization kernels, recipes, writer, reader and the conversion itself."""
