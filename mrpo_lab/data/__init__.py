"""From rows of a file or of the hub to token rows; imports no model."""
