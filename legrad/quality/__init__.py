"""Measure maps and masks: metrics, perturbation tests, and baseline methods to compare LeGrad with."""
