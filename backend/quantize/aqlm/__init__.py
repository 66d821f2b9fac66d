"""AQLM: weights as sums of codewords, found on the Gram matrices of the streamed calibration, and tuned afterwards."""
