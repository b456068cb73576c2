"""From measurements to a schedule.

``preset`` reads what is asked for, ``policies`` has a class for every way to make a schedule,
``schedule`` the optimisers behind them, ``peers`` the schedules of other cachers, and ``joint`` the
choice of step count and budget together. ``grids`` and ``grid_search`` choose the noise levels.
"""
