"""How the nano pair is made: what it is shown, how that is drawn, and how each model learns from it."""
