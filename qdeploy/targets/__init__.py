"""What a target's engine computes and which limits it has. No torch."""
