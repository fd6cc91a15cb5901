"""The paper's figures by simulation: baselines and AF-pipe as schedules on one event engine, beside its numbers.

Order of work, which the history of the repository shows: first ``constants`` and ``unreproducible`` were written,
before anything was simulated; then the hardware was calibrated on figure 6a (``hardware``); figures 10 to 14 are
predictions.
"""
