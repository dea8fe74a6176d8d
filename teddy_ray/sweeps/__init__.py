"""Sweeps: trials of a recipe with other values of some keys, run by Ray Tune, that share what they make.

space: what to try; checked: every trial, before anything runs; sweep: the whole. tuning, trainable, trial: how trials
run; hub: who makes what. outcome, results: what came of them; plots, page: how it is shown.
"""
