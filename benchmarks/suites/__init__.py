"""The suites: which providers run on which problems, and what logitless has to reach there."""
