"""The thin command lines. They turn options into a config and hold no logic of their own."""
