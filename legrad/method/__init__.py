"""LeGrad in closed form: towers, their forward pass, and relevance."""
