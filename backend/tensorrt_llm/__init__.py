"""TensorRT-LLM: which methods there are, what they need, and how its programs are called. Imports no torch."""
