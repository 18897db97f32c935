"""Errors, files, the machine and where models come from: the floor that everything else stands on."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
