"""Every implementation held to float64, over one table of cases and by one criterion."""
