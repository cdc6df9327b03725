"""One file per host: what puts the losses under somebody else's model or trainer."""
