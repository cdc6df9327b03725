"""What only the suite of the approximate strategies has: real text, exact gradients, orders, fine-tuning, plots."""
