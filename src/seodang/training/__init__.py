"""Training, whatever the model: the loop, its log and checkpoints, and several processes."""
