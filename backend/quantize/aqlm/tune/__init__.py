"""PV-tuning: codes, codebooks and all else of a model of additive weights, drawn to the base model's predictions."""
