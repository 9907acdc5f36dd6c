"""Training a model of the A.X K1 design from random weights."""
