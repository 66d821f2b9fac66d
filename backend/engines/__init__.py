"""How each ALGORITHM of the job file runs, and why one cannot run here."""
