"""The presets: sweeps written down as YAML."""
