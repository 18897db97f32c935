"""Tokens, losses, the two towers, and `PersonCLIP`, which holds them."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
