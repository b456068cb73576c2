"""What reports share: plots, progress, spreads over rounds, facts about the machine."""
