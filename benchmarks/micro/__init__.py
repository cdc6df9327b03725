"""Steps of a second or less under pytest-benchmark, for comparing commits: `pytest benchmarks`. See README.md."""
