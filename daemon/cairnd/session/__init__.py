"""Saves in progress: who is connected, what memory they hold, what each version still needs."""
