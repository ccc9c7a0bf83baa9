"""The commands beside the stages, one module each; pipeline/__main__.py has their options.

No stage imports them.
"""
