"""glasshive.security."""
