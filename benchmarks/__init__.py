"""Named problems x providers: time, peak memory and gradient error of every way to the same loss. See README.md."""
