"""Programs that measure, each against a named peer."""
