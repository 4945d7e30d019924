"""Trade-offs between aspects without telling lambda: adapters of single aspects, merged."""
