"""Transforms of weights and inputs that leave a layer's output as it is and make rounding lose less.

One file per published method; `make` is the interface. A transform is a pure function of weights and statistics.
"""
