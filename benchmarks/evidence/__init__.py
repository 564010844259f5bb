"""The evidence behind representation transfer: settings, rivals, statistics and report of ``benchmarks.transfer``."""
