"""Requests at different steps of their schedules in one batch, with caching."""
