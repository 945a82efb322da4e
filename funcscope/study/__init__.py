"""What runs and remembers: it feeds the pure functions and keeps their results."""
