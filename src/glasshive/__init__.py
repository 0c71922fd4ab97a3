"""glasshive: look inside language models that are split over a swarm of volunteers' GPUs."""
