"""Sweeps: trials of a recipe with other values of some keys, run by Ray Tune, that share their artifacts.

space -> what to try; trial -> one of them; hub -> who makes what, and what is told of it; tuning -> all of them;
outcome, judgement of them in results, page -> what came of it.
"""
