"""What segments cost, and so what a schedule saves.

``costs`` sums up what one image pays. The numbers are measured (``timings``, in a bundle:
``bundle_timings``), predicted for a GPU (``roofline``), or counted arithmetic (``costs.counted``).
"""
