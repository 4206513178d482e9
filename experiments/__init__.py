"""Experiments: cells, the sweep, metrics, figures, reports, the command line. The only composer of data, vlm and baselines."""
