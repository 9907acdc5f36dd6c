"""Think-Fusion: one model with two thinking modes."""
