"""Measurements, each a program of its own: any claim about speed is printed by one of them."""
