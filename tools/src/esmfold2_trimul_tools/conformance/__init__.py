"""Every implementation compared with float64, over one table of cases and by one criterion."""
