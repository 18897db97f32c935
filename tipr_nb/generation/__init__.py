"""Pictures from captions: diffusion pipelines, folders of generated pictures, training of the generator."""
import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
