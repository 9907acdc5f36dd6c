"""What a training run takes, before it is started."""
