"""Solvers as tables of coefficients, over grids of noise levels, as diffusers has them."""
