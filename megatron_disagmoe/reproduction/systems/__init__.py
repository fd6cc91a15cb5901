"""Training systems as schedules on the event engine; ``catalogue`` lists them."""
