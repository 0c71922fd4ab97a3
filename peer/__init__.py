"""glasshive.peer."""
