"""How good maps and masks are: metrics, perturbation, and the methods that LeGrad is compared with."""
