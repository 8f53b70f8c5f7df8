"""Comparisons that anyone can run: `make bench`. Run from the checkout; no part of what pip installs."""
