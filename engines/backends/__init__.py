"""What compiles graphs and what runs them."""
