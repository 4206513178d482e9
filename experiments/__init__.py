"""Experiments: cells, the sweep, metrics, figures, reports, the command line. The one composer of the rest."""
