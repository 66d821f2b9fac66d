"""What a quantization cost: perplexity, accuracy, speed, memory and size of two models, under one protocol.

Every number travels with its protocol (text, window, BOS rule, samples, dtype, device, versions), and
`report` refuses to put numbers of two protocols into one row. Importing this package costs nothing.
"""
