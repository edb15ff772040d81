"""The gate: an artifact on disk against its 16-bit baseline, in the runtime that serves it."""
