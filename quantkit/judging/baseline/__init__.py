"""The baseline's answers, kept so that no gate computes them a second time."""
