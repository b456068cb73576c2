"""From measurements to a schedule: presets, policies and the optimisers behind them."""
