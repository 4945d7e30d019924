"""Multi-reference preference optimization of language models.

``__init__.pyi`` lists the public API; everything else is private and may move. A name is imported
when it is first used, so ``import mrpo_lab`` takes no time. Configuration files use the same names,
as in ``_target_: mrpo_lab.VAW``: a saved configuration stays readable when a module moves.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
