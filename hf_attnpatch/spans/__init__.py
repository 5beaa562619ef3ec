"""Position remapping: attention at changed distances, for a longer context without training."""
