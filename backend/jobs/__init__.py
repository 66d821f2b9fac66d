"""Jobs: the store, the runner process of each job, its stages, and the calls that pages and commands make."""
