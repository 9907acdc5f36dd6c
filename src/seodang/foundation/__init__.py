"""A teacher of the A.X K1 design, from raw text, at any size."""
