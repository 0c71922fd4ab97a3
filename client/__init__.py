"""glasshive.client."""
