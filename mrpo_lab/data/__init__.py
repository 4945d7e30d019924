"""Preference data: from the rows of a file or of the hub to token rows. Knows no model."""
