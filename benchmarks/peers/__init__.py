"""Other compressors, brought to one shape so that one harness can measure them all.

Each module wraps one compressor behind the function ``compress`` of :mod:`.interface`. Importing a
module needs only torch; what the compressor itself needs is imported when ``compress`` runs.
"""
