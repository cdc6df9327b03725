"""TRL's trainers on logitless: `enable()` puts its operations under their losses, gradients and metrics."""

from .versions import RANGE, UnsupportedTRLError, check

__all__ = ["RANGE", "UnsupportedTRLError", "check"]
