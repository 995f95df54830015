"""A conversation with a model: prompt, history, drawing of tokens, streamed text; knows no terminal."""
