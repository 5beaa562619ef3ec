"""From full attention to windows: which layers lose least by one, and sinks that stand for the first tokens.

Everything is found on text, on the model as it is: :mod:`.choice` measures what a window costs each layer, and
:mod:`.sinks` works out the sinks. Windows are tried by wrappers around attention (:mod:`.attention`), which are gone
afterwards.
"""
