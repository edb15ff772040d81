"""Tasks of lm-eval, done by both models in the runtime that judges."""
