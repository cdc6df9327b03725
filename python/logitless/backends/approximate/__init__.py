"""Strategies that leave out, within a bound, what carries no probability."""
