"""MemVir: learning with memory-based virtual classes for deep metric learning (Ko, Gu, Kim, ICCV 2021)."""

__version__ = "0.1.0"
