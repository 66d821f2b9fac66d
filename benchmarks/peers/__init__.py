"""The other quantizers, each as a small program that does what its own documentation says."""
