"""What result rows say: their labels, how numbers are written, and the one verdict."""
