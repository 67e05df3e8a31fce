"""bayespass."""
