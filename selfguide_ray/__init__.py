"""SELF-GUIDE (Zhao et al. 2024, arXiv:2407.12874) as a distributed batch system on Ray."""

__version__ = "0.1.0"
