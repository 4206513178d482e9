"""Adapters that go to other programs, come from them, or are encrypted on the way."""
