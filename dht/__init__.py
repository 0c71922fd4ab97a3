"""glasshive.dht."""
