"""What a report shows, gathered from rows by the packages that own the computations."""
